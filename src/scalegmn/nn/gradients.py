"""Gradients of learned losses at probes, as features of nodes and edges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from scalegmn.networks import NetParams, NetSpec
from scalegmn.networks.gradients import derivatives
from scalegmn.nn.mlp import MLP
from scalegmn.nn.probes import layer_rows, root_mean_squares

Evaluate = Callable[..., list[Tensor]]
"""Networks, and shifts, to values before activations: `Probes.pre_activations`."""


class ProbeGradients(nn.Module):
    """Gradients of H learned losses of what networks f answer to probes u_1..u_P.

        v_h(p) = MLP([f(u_1), ..., f(u_P)])            the derivatives of loss h by the answers f(u_p)
        node i of layer l   A [g_i,h(p) / s_l]_{h, p}           g = dloss_h / dz_i at u_p, z_i before the activation
        edge from j to i    [sum_p g_i,h(p) x_j(p) / t_l]_h     dloss_h / dw_ij

    A channel of a CNN has the sum of g over its positions, that is the derivative by a number that is added to z_i at
    all of them, and an edge of a convolution the derivatives by its kernel, sums over probes and positions. Where the
    order of outputs does not matter, the MLP reads the softmax of the answers times n_L, class by class.

    The signals v depend on answers alone, which no symmetry moves. When the weights and the bias of neuron i are
    multiplied by q_i, g_i is divided by q_i, and the derivative by w_ij is multiplied by q_j / q_i (contravariant). For
    signs 1 / q = q, so that g_i goes with the bias and the derivative with w_ij. Scales have to be removed before
    (`scale_to_canonical`): in the canonical network 1 / q = q up to the sign, too. A has no bias; it is one for hidden
    neurons and another one for the outputs. s_l and t_l are root mean squares over the training networks, with the
    losses as they are at the start.

    Activations and signals of probes are the input of GradMetaNet (Gelberg et al., NeurIPS 2025,
    https://arxiv.org/abs/2507.01649, section 3); losses of the answers, learned with the model, are of this package.

    Args:
        num_losses: H.
        num_probes: P.
        dim: width d of node features.
        spec: the input networks, chains.
        num_layers: L, of the deepest networks.
        equal_outputs: whether the order of outputs does not matter.
    """

    scales: Tensor

    def __init__(
        self, num_losses: int, num_probes: int, dim: int, spec: NetSpec, num_layers: int, equal_outputs: bool
    ) -> None:
        super().__init__()
        num_answers = num_probes * (1 if equal_outputs else spec.layout[-1])
        self.num_losses, self.num_probes, self.equal_outputs = num_losses, num_probes, equal_outputs
        self.signals = MLP(num_answers, (2 * num_answers,), num_losses * num_answers)
        self.hidden_linear = nn.Linear(num_losses * num_probes, dim, bias=False)
        self.output_linear = nn.Linear(num_losses * num_probes, dim, bias=False)
        self.register_buffer("scales", torch.ones(2 * num_layers))

    def forward(self, params: NetParams, evaluate: Evaluate) -> tuple[list[Tensor], list[Tensor]]:
        """Features of nodes and edges of B networks.

        Args:
            params: the networks, without scales.
            evaluate: tells what they compute for the probes.

        Returns:
            Per layer of nodes 0..L, [B, n_l, d], zeros of input nodes, and per block of edges of k weights each,
            [B, n_l, n_{l-1}, H k].
        """
        values, rows = self._values(params, evaluate)
        scaled = [value / scale for value, scale in zip(values, self.scales[rows], strict=True)]
        *hidden, outputs = scaled[: params.spec.num_layers]
        nodes = [*map(self.hidden_linear, hidden), self.output_linear(outputs)]
        of_inputs = nodes[0].new_zeros(len(params), params.spec.layout[0], nodes[0].shape[-1])
        return [of_inputs, *nodes], scaled[params.spec.num_layers :]

    def fitted_on(
        self, batches: Iterable[NetParams], as_read: Callable[[NetParams], NetParams], evaluate: Evaluate
    ) -> Iterator[NetParams]:
        """The same batches; once all are drawn, `scales` are set by them.

        Args:
            batches: networks as they are stored.
            as_read: networks as `forward` gets them.
            evaluate: as in `forward`.
        """
        return root_mean_squares(self.scales, batches, lambda params: self._values(as_read(params), evaluate))

    def _values(self, params: NetParams, evaluate: Evaluate) -> tuple[list[Tensor], Tensor]:
        """Derivatives by z per layer 1..L, [B, n_l, H P], then by weights per block, [B, n_l, n_{l-1}, H k]; and which
        of `scales` each has."""
        spec, num_weights = params.spec, len(params.weights)

        def answer(*tensors: Tensor) -> Tensor:
            return evaluate(params.replace(weights=tensors[:num_weights]), tensors[num_weights:])[-1]

        shifts = [params.biases[0].new_zeros(len(params), self.num_probes, size) for size in spec.layout[1:]]
        by_loss = derivatives(answer, [*params.weights, *shifts], self._signals)
        by_input = list(zip(*by_loss, strict=True))
        by_weights = [torch.stack(of_losses, dim=3).flatten(3) for of_losses in by_input[:num_weights]]
        by_nodes = [torch.cat(of_losses, dim=1).mT for of_losses in by_input[num_weights:]]
        rows = layer_rows(spec, self.scales[: len(self.scales) // 2])
        return [*by_nodes, *by_weights], torch.cat([rows, rows + len(self.scales) // 2])

    def _signals(self, answers: Tensor) -> Tensor:
        """v of f(u_p), [B, P, n_L]: [H, B, P, n_L]."""
        if self.equal_outputs:
            of_classes = self.signals(answers.shape[2] * answers.softmax(2).mT)  # [B, n_L, H P]
            signals: Tensor = of_classes.unflatten(2, (self.num_losses, -1)).permute(2, 0, 3, 1)
            return signals
        signals = self.signals(answers.flatten(1))
        return signals.view(len(answers), self.num_losses, *answers.shape[1:]).transpose(0, 1)
