"""Gradients of learned losses at probes, as features of nodes and edges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from scalegmn.networks import NetParams, NetSpec
from scalegmn.networks.gradients import gradient_factors
from scalegmn.nn.mlp import MLP
from scalegmn.nn.probes import layer_rows, root_mean_squares


class ProbeGradients(nn.Module):
    """Gradients of H learned losses of what networks f answer to probes u_1..u_P.

        v_h(p) = MLP([f(u_1), ..., f(u_P)])            the derivatives of loss h by the answers f(u_p)
        node i of layer l   A [g_i,h(p) / s_l]_{h, p}           g = dloss_h / dz_i at u_p, z_i before the activation
        edge from j to i    [sum_p g_i,h(p) x_j(p) / t_l]_h     dloss_h / dw_ij, of rank one per probe

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
        spec: the input networks, linear layers in a chain.
        num_layers: L, of the deepest networks.
    """

    scales: Tensor

    def __init__(self, num_losses: int, num_probes: int, dim: int, spec: NetSpec, num_layers: int) -> None:
        super().__init__()
        num_answers = num_probes * spec.layout[-1]
        self.num_losses = num_losses
        self.signals = MLP(num_answers, (2 * num_answers,), num_losses * num_answers)
        self.hidden_linear = nn.Linear(num_losses * num_probes, dim, bias=False)
        self.output_linear = nn.Linear(num_losses * num_probes, dim, bias=False)
        self.register_buffer("scales", torch.ones(2 * num_layers))

    def forward(self, params: NetParams, inputs: Tensor, answers: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Features of nodes and edges of B networks.

        Args:
            params: the networks, without scales.
            inputs: u, [P, n_0].
            answers: f(u_p), [B, P, n_L].

        Returns:
            Per layer of nodes 0..L, [B, n_l, d], zeros of input nodes, and per block of edges, [B, n_l, n_{l-1}, H].
        """
        values, rows = self._values(params, inputs, answers)
        scaled = [value / scale for value, scale in zip(values, self.scales[rows], strict=True)]
        *hidden, outputs = scaled[: params.spec.num_layers]
        nodes = [*map(self.hidden_linear, hidden), self.output_linear(outputs)]
        of_inputs = nodes[0].new_zeros(len(params), params.spec.layout[0], nodes[0].shape[-1])
        return [of_inputs, *nodes], scaled[params.spec.num_layers :]

    def fitted_on(
        self, batches: Iterable[NetParams], as_read: Callable[[NetParams], tuple[NetParams, Tensor, Tensor]]
    ) -> Iterator[NetParams]:
        """The same batches; once all are drawn, `scales` are set by them.

        Args:
            batches: networks as they are stored.
            as_read: networks -> the arguments of `forward`.
        """
        return root_mean_squares(self.scales, batches, lambda params: self._values(*as_read(params)))

    def _values(self, params: NetParams, inputs: Tensor, answers: Tensor) -> tuple[list[Tensor], Tensor]:
        """Derivatives by z per layer 1..L, [B, n_l, H P], then by weights per block, [B, n_l, n_{l-1}, H]; and which of
        `scales` each has."""
        signals = self.signals(answers.flatten(1)).view(len(params), self.num_losses, *answers.shape[1:])
        xs, gs = gradient_factors(params, inputs, signals.transpose(0, 1))
        by_nodes = [g.permute(1, 3, 0, 2).flatten(2) for g in gs[1:]]
        by_weights = [torch.einsum("hbpi,bpj->bijh", g, x) for g, x in zip(gs[1:], xs[:-1], strict=True)]
        rows = layer_rows(params.spec, self.scales[: len(self.scales) // 2])
        return [*by_nodes, *by_weights], torch.cat([rows, rows + len(self.scales) // 2])
