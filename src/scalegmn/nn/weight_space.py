"""Layers on the weights and biases of a network, equivariant to permutations of its neurons (NFN, Zhou et al., 2023).

Shape letters: B networks, l = 1..L layers of n_l neurons, c channels, F_l kernel values (1 for linear layers). Weights
W_l are [B, n_l, n_{l-1}, c F_l], their last axis channel by channel; biases b_l are [B, n_l, c]. Modules map
lists of both, one tensor per layer, to lists of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from scalegmn.nn.mlp import Dropout

Features = tuple[list[Tensor], list[Tensor]]
"""Weights and biases, per layer."""


class WeightSpaceFourier(nn.Module):
    """x -> [sin(2 pi f x), cos(2 pi f x)], m fixed frequencies f ~ N(0, scale^2) (Tancik et al., 2020).

    Args:
        num_frequencies: m.
        scale: standard deviation of the frequencies.
    """

    frequencies: Tensor

    def __init__(self, num_frequencies: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(num_frequencies))

    def forward(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Features:
        """Weights [B, n_l, n_{l-1}, F_l] and biases [B, n_l, 1] -> 2m channels."""
        return list(map(self.features, weights)), list(map(self.features, biases))

    def features(self, x: Tensor) -> Tensor:
        """[..., F_l] -> [..., 2m F_l]."""
        angles = 2 * math.pi * self.frequencies[:, None] * x[..., None, :]
        return torch.cat([angles.sin(), angles.cos()], dim=-2).flatten(-2)


class SinusoidalPositions(nn.Module):
    """Appends 2b + 1 channels that depend on the input, the output and, with `layers`, the layer (NFN, section 2.4).

    phi(t) = [sin(pi f_1 t), .., sin(pi f_b t), cos(pi f_1 t), .., cos(pi f_b t), t], f from 1 to max_frequency / 2, of
    the inputs at W_1 and of the outputs at W_L and b_L, each counted from -1 to 1; elsewhere zeros. `layers` adds phi
    of the layer, counted likewise, to all of a layer.

    Args:
        num_bands: b.
        max_frequency: twice the largest f.
        layers: whether to add phi of the layer.
    """

    def __init__(self, num_bands: int, max_frequency: float, layers: bool) -> None:
        super().__init__()
        self.num_bands, self.max_frequency, self.layers = num_bands, max_frequency, layers
        self.dim = 2 * num_bands + 1

    def forward(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Features:
        """[B, n_l, n_{l-1}, c F_l] and [B, n_l, c] -> c + 2b + 1 channels."""
        last = len(weights) - 1
        depth = self._phi(last + 1, biases[0])
        new_weights, new_biases = [], []
        for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            position = depth[index] if self.layers else torch.zeros_like(depth[index])
            at_weight, at_bias = position[None, None], position[None]
            if index == 0:
                at_weight = at_weight + self._phi(weight.shape[2], weight)
            if index == last:
                outputs = self._phi(weight.shape[1], weight)
                at_weight, at_bias = at_weight + outputs[:, None], at_bias + outputs
            at_weight = at_weight.repeat_interleave(weight.shape[-1] // bias.shape[-1], dim=-1)  # for all kernel values
            new_weights.append(torch.cat([weight, at_weight.expand(*weight.shape[:3], -1)], dim=-1))
            new_biases.append(torch.cat([bias, at_bias.expand(*bias.shape[:2], -1)], dim=-1))
        return new_weights, new_biases

    def _phi(self, count: int, like: Tensor) -> Tensor:
        """[count, 2b + 1]."""
        t = torch.linspace(-1, 1, count, dtype=like.dtype, device=like.device)[:, None]
        bands = torch.linspace(1, self.max_frequency / 2, self.num_bands, dtype=like.dtype, device=like.device)
        angles = math.pi * bands * t
        return torch.cat([angles.sin(), angles.cos(), t], dim=-1)


class InputOutputEmbedding(nn.Module):
    """Adds a learned vector to W_1 for each input, and to W_L and b_L for each output ("NP-PosEmb", NFN, section 3.1).

    Args:
        layout: n = (n_0, ..., n_L).
        kernels: F_1..F_L.
        dim: c.
    """

    def __init__(self, layout: Sequence[int], kernels: Sequence[int], dim: int) -> None:
        super().__init__()
        self.first_weight = nn.Parameter(torch.randn(layout[0], dim * kernels[0]))
        self.last_weight = nn.Parameter(torch.randn(layout[-1], 1, dim * kernels[-1]))
        self.last_bias = nn.Parameter(torch.randn(layout[-1], dim))

    def forward(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Features:
        """[B, n_l, n_{l-1}, c F_l] and [B, n_l, c] -> the same."""
        weights, biases = list(weights), list(biases)
        weights[0] = weights[0] + self.first_weight
        weights[-1] = weights[-1] + self.last_weight
        biases[-1] = biases[-1] + self.last_bias
        return weights, biases


class PointwiseLayer(nn.Module):
    """W_l' = P_l W_l, b_l' = B_l b_l: an affine map per tensor, at every position.

    Args:
        kernels: F_1..F_L.
        in_dim: c.
        out_dim: c'.
    """

    def __init__(self, kernels: Sequence[int], in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight_maps = nn.ModuleList(nn.Linear(in_dim * f, out_dim * f) for f in kernels)
        self.bias_maps = nn.ModuleList(nn.Linear(in_dim, out_dim) for _ in kernels)

    def forward(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Features:
        """[B, n_l, n_{l-1}, c F_l] and [B, n_l, c] -> the same with c'."""
        return (
            [linear(weight) for linear, weight in zip(self.weight_maps, weights, strict=True)],
            [linear(bias) for linear, bias in zip(self.bias_maps, biases, strict=True)],
        )


class MapInputs(NamedTuple):
    """The tensors of which the new weights and biases of one layer are affine maps (`AffineMaps`); None: not read."""

    position: Tensor | None
    """The weights, [B, n_l, n_{l-1}, ...]."""

    sender: Tensor | None
    """rho_l, [B, n_{l-1}, ...]."""

    receiver: Tensor | None
    """kappa_l, [B, n_l, ...]."""

    all: Tensor
    """g, [B, ...]."""


class AffineMaps(nn.Module):
    """W' = P W + R rho + C kappa + G g and b' = B kappa + H g for one layer; terms of tensors that are None are left
    out. As a product, W' = P W * (R rho + C kappa + G g), where W is read.

    Args:
        inputs: tensors with the widths of those that `forward` reads.
        weight_dim: width of W'.
        bias_dim: width of b'.
        jointly: P, R, C and G start uniform within 1 / sqrt(the sum of their input widths), as B and H always do;
            false: each starts within 1 / sqrt(its input width).
        product: whether W' is a product.
    """

    def __init__(
        self, inputs: MapInputs, weight_dim: int, bias_dim: int, jointly: bool = True, product: bool = False
    ) -> None:
        super().__init__()
        self.product = product
        widths = {kind: tensor.shape[-1] for kind, tensor in inputs._asdict().items() if tensor is not None}
        self.weight_maps = nn.ModuleDict({kind: nn.Linear(width, weight_dim) for kind, width in widths.items()})
        self.bias_maps = nn.ModuleDict(
            {kind: nn.Linear(width, bias_dim) for kind, width in widths.items() if kind in ("receiver", "all")}
        )
        for maps in (self.weight_maps, self.bias_maps) if jointly else (self.bias_maps,):
            bound = sum(cast("nn.Linear", linear).in_features for linear in maps.values()) ** -0.5
            for parameter in maps.parameters():
                nn.init.uniform_(parameter, -bound, bound)

    def forward(self, inputs: MapInputs) -> tuple[Tensor, Tensor]:
        """W' [B, n_l or 1, n_{l-1} or 1, weight_dim] and b' [B, n_l or 1, bias_dim]; an axis along which the
        result is constant has size 1."""
        weight, of_senders, bias = self.at_neurons(inputs)
        weight = weight[:, :, None]
        if of_senders is not None:
            weight = weight + of_senders[:, None]
        if "position" in self.weight_maps:  # the largest last: what is added before has not been broadcast to it yet
            position = self.weight_maps["position"](inputs.position)
            weight = weight * position if self.product else weight + position
        return weight, bias

    def at_neurons(self, inputs: MapInputs) -> tuple[Tensor, Tensor | None, Tensor]:
        """All terms but P W: G g + C kappa [B, n_l or 1, weight_dim], R rho [B, n_{l-1}, weight_dim], and b'."""
        of_receivers, bias = (maps["all"](inputs.all)[:, None] for maps in (self.weight_maps, self.bias_maps))
        if "receiver" in self.weight_maps:
            of_receivers = of_receivers + self.weight_maps["receiver"](inputs.receiver)
        of_senders = self.weight_maps["sender"](inputs.sender) if "sender" in self.weight_maps else None
        if "receiver" in self.bias_maps:
            bias = bias + self.bias_maps["receiver"](inputs.receiver)
        return of_receivers, of_senders, bias


class NeuronLayer(nn.Module):
    """The general linear layer that is equivariant to permutations of all neurons, "NP" (NFN, section 2.2).

    W_l' = P_l W_l + R_l rho_l (at each sender) + C_l kappa_l (at each receiver) + G_l g,  b_l' = B_l kappa_l + H_l g,
    where rho_l = [mean of W_l over receivers, mean of W_{l-1} over senders, b_{l-1}], kappa_l = [mean of W_l over
    senders, b_l, mean of W_{l+1} over receivers], without the tensors of layers that do not exist, and g holds the
    means of all weight and bias tensors.

    Args:
        layout: n = (n_0, ..., n_L).
        kernels: F_1..F_L.
        in_dim: c.
        out_dim: c'.
        product: W_l' = P_l W_l * (R_l rho_l + C_l kappa_l + G_l g).
    """

    def __init__(
        self, layout: Sequence[int], kernels: Sequence[int], in_dim: int, out_dim: int, product: bool = False
    ) -> None:
        super().__init__()
        self.in_dim, self.out_dim = in_dim, out_dim
        inputs = self.map_inputs(*_empty(layout, kernels, in_dim))
        self.maps = nn.ModuleList(
            AffineMaps(x, out_dim * f, out_dim, product=product) for x, f in zip(inputs, kernels, strict=True)
        )

    @staticmethod
    def map_inputs(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[MapInputs]:
        """Per layer, the tensors that its maps read."""
        over_receivers, over_senders = [w.mean(1) for w in weights], [w.mean(2) for w in weights]
        g = _means_of_all(over_receivers, biases)
        inputs = []
        for index, weight in enumerate(weights):
            sender = [over_receivers[index]]
            if index:
                sender += [over_senders[index - 1], biases[index - 1]]
            receiver = [over_senders[index], biases[index], *over_receivers[index + 1 : index + 2]]
            inputs.append(MapInputs(weight, torch.cat(sender, -1), torch.cat(receiver, -1), g))
        return inputs

    def forward(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Features:
        """[B, n_l, n_{l-1}, c F_l] and [B, n_l, c] -> the same with c'."""
        new = [maps(inputs) for maps, inputs in zip(self.maps, self.map_inputs(weights, biases), strict=True)]
        return self.shaped(new)

    def shaped(self, new: Sequence[tuple[Tensor, Tensor]]) -> Features:
        """Weights and biases of the results of all maps."""
        return [weight for weight, _ in new], [bias for _, bias in new]


class HiddenNeuronLayer(nn.Module):
    """The linear layer that is equivariant to permutations of hidden neurons, "HNP" (NFN, section 2.2), less one term.

    Weights between hidden layers have the maps of `NeuronLayer`. Inputs and outputs do not permute, so each hidden
    neuron has one vector of all its weights in W_1 or W_L: vec W_1[i], vec W_L[:, j], channels before inputs or
    outputs. W_1' = C_1 kappa_1 + G_1 g, kappa_1 = [vec W_1[i], mean of W_2 over receivers, b_1]; W_L' = R_L rho_L + G_L
    g, rho_L = [vec W_L[:, j], mean of W_{L-1} over senders]; b_L' = H_L g. rho_2 and kappa_{L-1} also hold vec W_1[i]
    and vec W_L[:, j] (for L = 2: rho_L and kappa_1 do), and g also holds the means of vec W_1 and vec W_L over hidden
    neurons, and b_L. As published, rho_L lacks b_{L-1}, the missing term.

    Args:
        layout: n = (n_0, ..., n_L), L > 1.
        kernels: F_1..F_L.
        in_dim: c.
        out_dim: c'.
        product: W_l' = P_l W_l * (R_l rho_l + C_l kappa_l + G_l g) between hidden layers.
    """

    def __init__(
        self, layout: Sequence[int], kernels: Sequence[int], in_dim: int, out_dim: int, product: bool = False
    ) -> None:
        super().__init__()
        self.in_dim, self.out_dim = in_dim, out_dim
        inputs, last = self.map_inputs(*_empty(layout, kernels, in_dim)), len(kernels) - 1
        self.num_inputs, self.num_outputs = layout[0], layout[-1]
        self.maps = nn.ModuleList()
        for index, f in enumerate(kernels):
            ends = {0: layout[0], last: layout[-1]}.get(index, 1)
            biases = out_dim * (layout[-1] if index == last else 1)
            self.maps.append(AffineMaps(inputs[index], out_dim * f * ends, biases, index > 0, product))

    @staticmethod
    def map_inputs(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> list[MapInputs]:
        """Per layer, the tensors that its maps read."""
        last = len(weights) - 1
        over_receivers, over_senders = [w.mean(1) for w in weights], [w.mean(2) for w in weights]
        first_whole = weights[0].mT.flatten(2)  # [B, n_1, c F_1 n_0]
        last_whole = weights[last].permute(0, 2, 3, 1).flatten(2)  # [B, n_{L-1}, c F_L n_L]
        ends = [over_receivers[0], over_senders[last], biases[last]]
        g = torch.cat([_means_of_all(over_receivers, biases), *(x.mT.flatten(1) for x in ends)], -1)
        inputs = []
        for index, weight in enumerate(weights):
            if index == 0:
                sender, receiver = [], [first_whole, over_receivers[1], biases[0]]
            elif index == last:
                sender, receiver = [last_whole, over_senders[last - 1]], []
            else:
                sender = [over_receivers[index], over_senders[index - 1], biases[index - 1]]
                receiver = [over_senders[index], biases[index], over_receivers[index + 1]]
            sender += [first_whole] if index == 1 else []
            receiver += [last_whole] if index == last - 1 else []
            between = weight if 0 < index < last else None
            of_sender, of_receiver = (torch.cat(x, -1) if x else None for x in (sender, receiver))
            inputs.append(MapInputs(between, of_sender, of_receiver, g))
        return inputs

    def forward(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Features:
        """[B, n_l, n_{l-1}, c F_l] and [B, n_l, c] -> the same with c'."""
        new = [maps(inputs) for maps, inputs in zip(self.maps, self.map_inputs(weights, biases), strict=True)]
        return self.shaped(new)

    def shaped(self, new: Sequence[tuple[Tensor, Tensor]]) -> Features:
        """Weights and biases of the results of all maps, those of inputs and outputs each in its place."""
        weights, biases = [weight for weight, _ in new], [bias for _, bias in new]
        weights[0] = torch.unflatten(weights[0][:, :, 0], -1, (-1, self.num_inputs)).mT
        weights[-1] = torch.unflatten(weights[-1][:, 0], -1, (-1, self.num_outputs)).permute(0, 3, 1, 2)
        biases[-1] = torch.unflatten(biases[-1][:, 0], -1, (-1, self.num_outputs)).mT
        return weights, biases


def _empty(layout: Sequence[int], kernels: Sequence[int], dim: int) -> Features:
    """Features without storage (on the device `meta`), for their widths."""
    sizes = zip(layout[1:], layout[:-1], kernels, strict=True)
    weights = [torch.empty(1, n, m, dim * f, device="meta") for n, m, f in sizes]
    return weights, [torch.empty(1, n, dim, device="meta") for n in layout[1:]]


def _means_of_all(over_receivers: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """g of `NeuronLayer`: the means of all weight and all bias tensors, [B, sum of widths]."""
    return torch.cat([x.mean(1) for x in (*over_receivers, *biases)], -1)


class ChannelNorm(nn.Module):
    """gamma (x - mean) / (sd + 1e-5) + beta over the channels at each position, sd unbiased, gamma and beta per tensor.

    Args:
        kernels: F_1..F_L.
        dim: c.
    """

    def __init__(self, kernels: Sequence[int], dim: int) -> None:
        super().__init__()
        widths = [*(dim * f for f in kernels), *(dim for _ in kernels)]
        self.gammas = nn.ParameterList(torch.ones(width) for width in widths)
        self.betas = nn.ParameterList(torch.zeros(width) for width in widths)

    def forward(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Features:
        """[B, n_l, n_{l-1}, c F_l] and [B, n_l, c] -> the same."""
        new = list(map(channel_norm, (*weights, *biases), self.gammas, self.betas))
        return new[: len(weights)], new[len(weights) :]


def channel_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """`ChannelNorm` of one tensor."""
    sd, mean = torch.std_mean(x, dim=-1, keepdim=True)
    return torch.addcmul(beta, gamma, (x - mean) / (sd + 1e-5))


class NeuronNorm(nn.Module):
    """LayerNorms as in NFN's code ("ParamLayerNorm"): of W_1 over channels and inputs, of W_L and b_L over channels and
    outputs, of all other tensors over channels; at each hidden neuron.

    Args:
        layout: n = (n_0, ..., n_L), all layers linear.
        dim: c.
    """

    def __init__(self, layout: Sequence[int], dim: int) -> None:
        super().__init__()
        num_layers = len(layout) - 1
        shapes = [(layout[0], dim), *[(dim,)] * (num_layers - 2), (layout[-1], dim)]
        self.weight_norms = nn.ModuleList(map(nn.LayerNorm, shapes))
        self.bias_norms = nn.ModuleList(map(nn.LayerNorm, [*[(dim,)] * (num_layers - 1), (layout[-1], dim)]))

    def forward(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Features:
        """[B, n_l, n_{l-1}, c] and [B, n_l, c] -> the same."""
        weights = [*weights[:-1], weights[-1].transpose(1, 2)]
        *weights, last = (norm(x) for norm, x in zip(self.weight_norms, weights, strict=True))
        return [*weights, last.transpose(1, 2)], [norm(x) for norm, x in zip(self.bias_norms, biases, strict=True)]


class ChannelDropout(nn.Module):
    """While training, dropout of whole channels of weights and of single entries of biases.

    Args:
        p: the probability.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.dropout = Dropout(p)

    def forward(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Features:
        """[B, n_l, n_{l-1}, c F_l] and [B, n_l, c] -> the same."""
        if self.dropout.p and self.training:
            weights = [w * self.dropout(w.new_ones(len(w), 1, 1, w.shape[-1])) for w in weights]
        return list(weights), list(map(self.dropout, biases))


class ActivationDropout(nn.Module):
    """sigma, then `ChannelDropout`.

    Args:
        activation: sigma.
        p: the probability.
    """

    def __init__(self, activation: Callable[[Tensor], Tensor], p: float) -> None:
        super().__init__()
        self.activation = activation
        self.dropout = ChannelDropout(p)

    def forward(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Features:
        """[B, n_l, n_{l-1}, c F_l] and [B, n_l, c] -> the same."""
        new: Features = self.dropout(list(map(self.activation, weights)), list(map(self.activation, biases)))
        return new


class ChannelProducts(nn.Module):
    """x_c' = x_{2c} x_{2c+1}: half as many channels.

    Args:
        kernels: F_1..F_L.
    """

    def __init__(self, kernels: Sequence[int]) -> None:
        super().__init__()
        self.kernels = kernels

    def forward(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Features:
        """[B, n_l, n_{l-1}, c F_l] and [B, n_l, c] -> the same with c / 2."""
        return list(map(channel_products, weights, self.kernels)), [channel_products(bias, 1) for bias in biases]


def channel_products(x: Tensor, kernel: int) -> Tensor:
    """`ChannelProducts` of one tensor."""
    even, odd = x.unflatten(-1, (-1, 2, kernel)).unbind(-2)
    new: Tensor = even * odd
    return new.flatten(-2)


class WeightSpacePool(nn.Module):
    """The mean of every weight and bias tensor over neurons, per channel (NFN, section 2.3).

    Args:
        kernels: F_1..F_L.
        hidden: average over hidden neurons only, so that each input of W_1 and each output of W_L and b_L has its own
            mean; false: average over all neurons.
    """

    def __init__(self, kernels: Sequence[int], hidden: bool) -> None:
        super().__init__()
        self.kernels, self.hidden = kernels, hidden

    def forward(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        """[B, n_l, n_{l-1}, c F_l] and [B, n_l, c] -> [B, c * positions], channel by channel. Positions are those of
        W_1, b_1, W_2, .., and in each tensor by neuron, then kernel value."""
        last, parts = len(weights) - 1, []
        for index, (weight, bias, f) in enumerate(zip(weights, biases, self.kernels, strict=True)):
            weight_rows, bias_rows = weight.mean((1, 2))[:, None], bias.mean(1)[:, None]
            if self.hidden and index == 0:
                weight_rows = weight.mean(1)
            if self.hidden and index == last:
                weight_rows, bias_rows = weight.mean(2), bias
            parts += [torch.unflatten(weight_rows, -1, (-1, f)).transpose(1, 2).flatten(2), bias_rows.mT]
        return torch.cat(parts, dim=2).flatten(1)
