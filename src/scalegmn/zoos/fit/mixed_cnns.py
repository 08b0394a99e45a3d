"""Training of CNNs of different architectures: grouped convolutions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d, cross_entropy

from scalegmn.networks import LayerSpec
from scalegmn.networks.evaluate import activate, with_residual
from scalegmn.zoos.fit.cnn_descent import Fit, matrices

MIXED_AT_ONCE = 16
"""Networks of mixed architecture that one CPU core works on at a time."""


class _Kind(NamedTuple):
    """Networks with equal layers, whose residual sources have equal widths too."""

    layer: LayerSpec
    members: list[int]
    keep: Tensor
    """[members, 1, 1, 1], 1 - p of their dropout."""


class MixedFit(Fit):
    """Networks of any architectures with convolutions of stride 1 and odd kernels, padded to keep the size of images.

    Layer by layer: convolutions of one size are one call, each network a group of its channels; what follows is one
    call for all that have the same activation and residual connection. Per network there are only views: even alone,
    one convolution outweighs them a hundred times.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.flat.requires_grad_()
        self.layers = [self._calls(index) for index in range(max(spec.num_layers for spec in self.specs))]

    def _calls(self, index: int) -> list[list[_Kind]]:
        """The networks whose layer `index` is computed together: by shape of the weights, then by kind."""
        calls: dict[tuple[int, ...], dict[tuple[LayerSpec, int], list[int]]] = {}
        for number, spec in enumerate(self.specs):
            if index < spec.num_layers:
                layer = spec.layers[index]
                width = 0 if layer.residual is None else spec.layers[layer.residual].out_dim
                calls.setdefault(layer.weight_shape, {}).setdefault((layer, width), []).append(number)
        keep = 1 - self.choices.dropout.view(-1, 1, 1, 1)
        return [
            [_Kind(layer, members, keep[members]) for (layer, _), members in kinds.items()] for kinds in calls.values()
        ]

    def forward(self, index: Tensor, training: bool) -> Tensor:
        """As in `Fit`."""
        of_layers = [matrices(spec, flat) for spec, flat in zip(self.specs, self.flat.split(self.sizes), strict=True)]
        x = dict(enumerate(self.pixels[index]))  # of each network [P, channels, height, width]
        outputs: list[dict[int, Tensor]] = []  # of each layer
        for number, calls in enumerate(self.layers):
            outputs.append({})
            for kinds in calls:
                layer, together = kinds[0].layer, [k for kind in kinds for k in kind.members]
                inside = torch.cat([x[k] for k in together], 1).contiguous(memory_format=torch.channels_last)
                if layer.kernel is None:
                    inside = inside.mean((2, 3), keepdim=True)
                matrix = torch.cat([of_layers[k][number] for k in together])
                weight = matrix[:, :-1].unflatten(1, (layer.in_dim, *(layer.kernel or (1, 1))))
                z = conv2d(inside, weight, matrix[:, -1], padding="same", groups=len(together))
                z = z.unflatten(1, (len(together), layer.out_dim))
                sizes = [len(kind.members) for kind in kinds]
                for (of_kind, members, keep), out in zip(kinds, z.split(sizes, 1), strict=True):
                    if of_kind.residual is not None:
                        out = with_residual(out, torch.stack([outputs[of_kind.residual][k] for k in members], 1))
                    out = activate(out, of_kind.activation)
                    if training and of_kind.kernel is not None:
                        noise = torch.empty_like(out).uniform_(generator=self.generator)
                        out = out * noise.lt_(keep).div_(keep)
                    outputs[-1].update(zip(members, out.unbind(1), strict=True))
            x = outputs[-1]
        last = [outputs[spec.num_layers - 1][number] for number, spec in enumerate(self.specs)]
        return torch.stack(last)[..., 0, 0].mT

    def differentiate(self, index: Tensor) -> None:
        """As in `Fit`."""
        loss = cross_entropy(self.forward(index, training=True), self.labels[index], reduction="sum") / index.shape[1]
        (self.grad,) = torch.autograd.grad(loss, self.flat)
