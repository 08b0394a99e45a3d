"""GradMetaNet (Gelberg et al., NeurIPS 2025): what neurons compute for probes, and what is propagated back to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from scalegmn.models.base import Metanetwork, ModelConfig
from scalegmn.models.registry import METANETWORKS
from scalegmn.networks import NetParams, NetSpec
from scalegmn.networks.gradients import gradient_factors
from scalegmn.nn.mlp import MLP


@dataclass(frozen=True)
class GradMetaNetConfig(ModelConfig):
    """GradMetaNet: gradients at probe points in their factors, an activation and a signal per neuron and probe."""

    name = "gradmetanet"

    num_probes: int = 32
    """Inputs sent through each network, each with a learned signal that is sent back."""

    hidden_dim: int = 32
    """Width of the features of a neuron for a probe."""

    num_layers: int = 3
    """Equivariant layers."""

    readout_dim: int = 128
    """For vectors: width of the hidden layer of the readout."""

    def __post_init__(self) -> None:
        counts = ["num_probes", "hidden_dim", "num_layers", "readout_dim", "out_dim"]
        problems = self.wrong_choices() + self.wrong_numbers(counts)
        if self.normalize is not None:
            problems.append(f"normalize: found {self.normalize}, but probes go through networks as they are; use null")
        self.refuse(problems)

    @property
    def exact_symmetries(self) -> frozenset[str]:
        """Permutations of hidden neurons."""
        return frozenset({"permutation"})

    def build(self, spec: NetSpec) -> GradMetaNet:
        """The model for networks of `spec`."""
        return GradMetaNet(self, spec)


METANETWORKS.register(GradMetaNetConfig.name, GradMetaNetConfig)


class SetOfSetsLayer(nn.Module):
    """h'_pi = A h_pi + B mean_q h_qi + C mean_j h_pj + D mean_qj h_qj + c: all linear maps that are equivariant to
    permutations of probes and of neurons (Hartford et al., 2018, https://arxiv.org/abs/1803.02879).

    Args:
        dim: width of h.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.own = nn.Linear(dim, dim)
        self.over_probes, self.over_neurons, self.over_all = (nn.Linear(dim, dim, bias=False) for _ in range(3))

    def forward(self, h: Tensor) -> Tensor:
        """[B, P, N, d] -> the same."""
        # of sums, as the gradient of `mean` is written out for all of h
        of_neurons, of_probes = (h.sum(axis, keepdim=True) / h.shape[axis] for axis in (1, 2))
        of_all = of_neurons.mean(2, keepdim=True)
        new: Tensor = (
            self.own(h) + self.over_probes(of_neurons) + (self.over_neurons(of_probes) + self.over_all(of_all))
        )
        return new


class GradMetaNet(Metanetwork):
    """A function of the gradients of <v_p, f(u_p)> of a network f at learned probes u_p, v_p, p = 1..P.

        h_pi = A [x_i(p) / s_l, g_i(p) / t_l] + P[l]              `gradient_factors` of neuron i of node layer l
        h    <- h + relu(SetOfSetsLayer(LN(h)))                    over all probes and all neurons of a network
        h_i  = mean over p of h_pi
        vector      MLP([h_i of inputs and outputs, mean over i in l of h_i for hidden l])
        parameters  dW_ij = MLP_1([h_i, h_j]),  db_i = MLP_2(h_i)

    The positions P[l] are learned, one per hidden layer and one per input and output. s_l and t_l, the root mean
    squares of activations and signals over the training split, are set by `fit_normalization`. The model is invariant
    (changes of parameters: equivariant) to permutations of hidden neurons. It does not keep signs, scales or phases,
    which multiply x_i and divide g_i. It reads weights through f alone.

    See Gelberg et al., GradMetaNet: An Equivariant Architecture for Learning on Gradients, NeurIPS 2025,
    https://arxiv.org/abs/2507.01649; residuals and layer norms are of this package.

    Args:
        config: the hyper-parameters.
        spec: the input networks.

    Raises:
        ValueError: the networks are no chains of linear layers without residual connections, or have no hidden layer.
    """

    activation_scales: Tensor
    signal_scales: Tensor

    def __init__(self, config: GradMetaNetConfig, spec: NetSpec) -> None:
        config.refuse_residuals(spec)
        if spec.is_cnn or spec.num_layers < 2:
            raise ValueError(f"model: gradmetanet reads linear layers with hidden ones, found {spec}; use probegen")
        super().__init__(config, spec, None)
        self.config, d, layout = config, config.hidden_dim, spec.layout
        self.inputs = nn.Parameter(2 * torch.rand(config.num_probes, layout[0]) - 1)
        self.signals = nn.Parameter(torch.randn(config.num_probes, layout[-1]))
        self.register_buffer("activation_scales", torch.ones(spec.num_layers + 1))
        self.register_buffer("signal_scales", torch.ones(spec.num_layers + 1))
        self.lift = nn.Linear(2, d)
        self.positions = nn.Parameter(torch.randn(layout[0] + spec.num_layers - 1 + layout[-1], d))
        self.layers = nn.ModuleList(SetOfSetsLayer(d) for _ in range(config.num_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(d) for _ in range(config.num_layers))
        if config.changes_parameters:
            self.of_weights, self.of_biases = (MLP(width, (d,), config.heads) for width in (2 * d, d))
        else:
            self.readout = MLP(len(self.positions) * d, (config.readout_dim,), config.out_dim)

    @torch.no_grad()
    def fit_normalization(self, batches: Iterable[NetParams]) -> None:
        """Sets the scales of activations and signals from batches of training networks, at the probes as they are."""
        squares, count = torch.zeros(2, len(self.signal_scales), dtype=torch.float64, device=self.inputs.device), 0
        for params in batches:
            factors = gradient_factors(params.with_batch_norm_folded(), self.inputs, self.signals)
            squares += torch.stack(
                [torch.stack([x.double().square().mean() * len(params) for x in xs]) for xs in factors]
            )
            count += len(params)
        scales = (squares / max(count, 1)).sqrt()
        scales = torch.where(scales > 0, scales, 1)
        self.activation_scales.copy_(scales[0])
        self.signal_scales.copy_(scales[1])

    def forward(self, params: NetParams) -> Tensor | NetParams:
        """B networks -> [B, out_dim] or, with `output: parameters`, changes of all weights and biases.

        Raises:
            ValueError: the networks are not those that the model was built for.
        """
        self.validate_spec(params.spec)
        layout, num_inputs, num_outputs = self.spec.layout, self.spec.layout[0], self.spec.layout[-1]
        factors = gradient_factors(params, self.inputs, self.signals)
        scaled = (
            torch.cat([x / scale for x, scale in zip(xs, scales, strict=True)], dim=2)
            for xs, scales in zip(factors, (self.activation_scales, self.signal_scales), strict=True)
        )
        repeats = torch.tensor([*[1] * num_inputs, *layout[1:-1], *[1] * num_outputs], device=self.positions.device)
        h = self.lift(torch.stack(list(scaled), dim=-1)) + self.positions.repeat_interleave(repeats, dim=0)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            h = h + torch.relu(layer(norm(h)))
        nodes = h.mean(1).split(layout, dim=1)  # [B, n_l, d] each
        if self.config.changes_parameters:
            return self.joined_heads(self._changes(params, nodes))
        pooled = [nodes[0].flatten(1), *(x.mean(1) for x in nodes[1:-1]), nodes[-1].flatten(1)]
        output: Tensor = self.readout(*pooled)
        return output

    def _changes(self, params: NetParams, nodes: tuple[Tensor, ...]) -> list[NetParams]:
        """Changes of each head, before the learned factor of each layer."""
        weights, biases = [], [self.of_biases(x) for x in nodes[1:]]
        for below, above in pairwise(nodes):
            shape = (-1, above.shape[1], below.shape[1], -1)
            weights.append(self.of_weights(above[:, :, None].expand(shape), below[:, None].expand(shape)))
        return [
            params.replace(weights=tuple(w[..., head] for w in weights), biases=tuple(b[..., head] for b in biases))
            for head in range(self.config.heads)
        ]
