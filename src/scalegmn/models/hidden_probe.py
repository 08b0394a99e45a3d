"""HiddenProbe: what networks answer to learned inputs, and what their hidden neurons compute for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from scalegmn.models.probegen import ProbeGen, ProbeGenConfig
from scalegmn.models.registry import METANETWORKS
from scalegmn.networks import NetParams, NetSpec, ScalarGroup
from scalegmn.networks.cnn import cnn_activations
from scalegmn.networks.evaluate import activations
from scalegmn.nn.mlp import MLP
from scalegmn.symmetry.groups import by_group


@dataclass(frozen=True)
class HiddenProbeConfig(ProbeGenConfig):
    """ProbeGen that also reads what hidden neurons compute, pooled so that it keeps permutation, sign, scale, phase."""

    name = "hidden_probe"

    neuron_dim: int = 64
    """Width of what is read of each hidden neuron, and of the hidden layer of the MLP that reads it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse(self.wrong_numbers(["neuron_dim"]))

    def build(self, spec: NetSpec) -> HiddenProbe:
        """The model for networks of `spec`."""
        return HiddenProbe(self, spec)


METANETWORKS.register(HiddenProbeConfig.name, HiddenProbeConfig)


class HiddenProbe(ProbeGen):
    """MLP([f(p_1), ..., f(p_Q), h]) of a network f of L layers, for probes p_q = generator(z_q) as in ProbeGen.

        x_i = (sigma(z_i(p_1)), ..., sigma(z_i(p_Q)))           responses of hidden neuron i of layer l
        u_i = x_i / r_i                                         r_i = RMS of x_i where scalars are positive numbers
        h   = mean over l < L of mean over i of rho([u_i, l / L]) + rho([-u_i, l / L])

    rho is an MLP. Of a channel, responses are means over positions. Where q multiplies a neuron's incoming weights and
    bias, x_i is multiplied by chi(q), and where a sine is shifted by k half-turns, by (-1)^k. Both leave
    rho(u) + rho(-u) as it is, so the model is invariant to permutations, signs, scales and phases of hidden neurons
    (`r_i` is 1 for activations that admit no scales, where sizes are read).

    Hidden responses in an MLP's input, in the order of neurons, keep none of these. As the pooled ones, they are no
    function of f alone: networks of one function but different neurons have different outputs. Probes are those of
    Kahana et al. (ICLR 2025, https://arxiv.org/abs/2410.10811); pooling is as in Deep Sets (Zaheer et al., 2017,
    https://arxiv.org/abs/1703.06114) and the even map as in SignNet (Lim et al., 2023, https://arxiv.org/abs/2202.13013).

    Args:
        config: the hyper-parameters.
        spec: the input networks, with at least one hidden layer.

    Raises:
        ValueError: as in `ProbeGen`, or there is no hidden layer.
    """

    config: HiddenProbeConfig

    def __init__(self, config: HiddenProbeConfig, spec: NetSpec) -> None:
        _check_hidden(spec)
        super().__init__(config, spec)
        width = config.neuron_dim
        self.rho = MLP(config.num_probes + 1, (width,), width, layer_norm=False)

    @staticmethod
    def response_dim(config: ProbeGenConfig, spec: NetSpec) -> int:
        """The width of `responses`."""
        assert isinstance(config, HiddenProbeConfig)
        return ProbeGen.response_dim(config, spec) + config.neuron_dim

    def responses(self, params: NetParams, probes: Tensor) -> Tensor:
        """Answers and pooled responses of hidden neurons, [B, Q n_L + neuron_dim]."""
        if self.spec.is_cnn:
            *hidden, answers = cnn_activations(params, probes, self.config.stride, self.config.padding)
        else:
            *hidden, answers = activations(params, probes)
        pooled = []
        for layer, x in enumerate(unscaled_responses(params, [x.mT for x in hidden])):
            depth = x.new_full((*x.shape[:2], 1), (layer + 1) / params.spec.num_layers)
            pooled.append((self.rho(x, depth) + self.rho(-x, depth)).mean(1))
        return torch.cat([answers.flatten(1), torch.stack(pooled).mean(0)], dim=1)

    def validate_spec(self, spec: NetSpec) -> None:
        """Raises ValueError unless the model can read networks of `spec`."""
        super().validate_spec(spec)
        _check_hidden(spec)


def unscaled_responses(params: NetParams, responses: Sequence[Tensor]) -> list[Tensor]:
    """Responses of hidden neurons divided by their root mean square, where their scalars are any positive numbers.

    Args:
        params: B networks.
        responses: per hidden layer, [B, n_l, Q]; each neuron's are multiplied by chi(q).
    """
    num_probes, scales = responses[0].shape[2], [torch.ones_like(x[..., 0]) for x in responses]
    for coupled in params.spec.scaling_classes:
        for layer in coupled.layers:
            size = torch.linalg.vector_norm(responses[layer][:, coupled.channels], dim=2) / math.sqrt(num_probes)
            scale = by_group(params, coupled, partial(ScalarGroup.canonical, norm=size))
            before, after = scales[layer][:, : coupled.channels.start], scales[layer][:, coupled.channels.stop :]
            scales[layer] = torch.cat([before, scale, after], dim=1)
    return [x * scale[..., None] for x, scale in zip(responses, scales, strict=True)]


def _check_hidden(spec: NetSpec) -> None:
    """Raises ValueError for networks without hidden neurons."""
    if spec.num_layers < 2:
        raise ValueError(f"model: hidden_probe reads hidden neurons, found {spec}; use probegen")
