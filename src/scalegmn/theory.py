"""Expressivity as programs: hand-set weights with which ScaleGMN computes what its input networks compute.

ScaleGMN can simulate the forward pass of its input network (Theorem in section 5 of
https://arxiv.org/abs/2406.10685), and, with a contravariant stream, the backward pass. After l layers the features of
the nodes of layers up to l are z and a = sigma(z); after as many layers more, those of the contravariant stream are
delta = dLoss / dz, and those of an edge the gradient delta_i a_j of its weight.

The state of a node is (b, z, a): messages are w_ij a_j; the update sets z_i = b_i + sum_j w_ij a_j and a_i = z_i phi.
phi is invariant: for relu 1 where z is positive and else 0, from z / ||x||; for odd activations the even sigma(z) / z.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from scalegmn.models.scalegmn import EquivariantNetConfig, ScaleGMN, ScaleGMNConfig
from scalegmn.models.scalegmn.streams import StreamScaleGMN, StreamWidths
from scalegmn.networks import ACTIVATIONS, NetParams, NetSpec
from scalegmn.nn.invariant import InvariantLayer
from scalegmn.nn.mlp import MLP
from scalegmn.nn.streams import StreamGraph, Streams

STEEPNESS = 1e8
"""K of phi = 1 - relu(1 - relu(K z / ||x||)): exact but for 0 < z < ||x|| / K."""

BIAS, PRE, POST = range(3)
"""The components b, z and a of a node's state."""

_SYMMETRIES: dict[str, Literal["scale", "sign"]] = {"relu": "scale", "tanh": "sign", "sine": "sign"}


class Quotient(nn.Module):
    """g(x) of which component `POST` is sigma(z) / z, with z the sum of b and of the message, and all others are 1.

    The universal approximation of the theorem put in exactly: sigma is odd, so sigma(z) / z is a function of what an
    invariant map of signs keeps.

    Args:
        function: sigma.
        slope: sigma'(0).
    """

    def __init__(self, function: Callable[[Tensor], Tensor], slope: float) -> None:
        super().__init__()
        self.function, self.slope = function, slope

    def forward(self, context: object, x: Tensor) -> Tensor:
        """x and m side by side, [n, 6] -> [n, 3]."""
        z = x[:, BIAS] + x[:, 3 + POST]
        quotient = torch.where(z == 0, self.slope, self.function(z) / torch.where(z == 0, 1, z))
        return torch.stack([torch.ones_like(z), torch.ones_like(z), quotient], dim=-1)


@torch.no_grad()
def forward_scalegmn(spec: NetSpec, inputs: Tensor, fitted_range: float | None = None) -> ScaleGMN:
    """A forward ScaleGMN in float64 that evaluates networks of `spec` at one input; `node_states` reads its features.

    Args:
        spec: a chain of linear layers with one activation, relu, tanh or sine.
        inputs: [n_0]; they stand in the positional embeddings of input nodes.
        fitted_range: of sines, phi is an MLP of the model, fitted to sin(w0 z) / z for |z| up to here; None: phi is
            `Quotient`. relu needs neither: phi is an MLP that is set exactly.

    Raises:
        ValueError: the networks are others.
    """
    activation = _activation(spec)
    width = 2 if fitted_range is None else _NUM_FITTED
    config = ScaleGMNConfig(
        symmetry=_SYMMETRIES[activation],
        readout="full_graph",
        num_layers=spec.num_layers,
        hidden_dim=3,
        mlp_dims=(width, width) if activation == "relu" else (width,),
        mlp_activation="relu" if activation == "relu" else "silu",
        mlp_layer_norm=False,
        edge_positions=False,
        update_edges=False,
        skip_connections=False,
        message_function="product",
        update=EquivariantNetConfig(io="factor"),
        engine="plain",
    )
    model = ScaleGMN(config, spec).double()
    model.node_linear.weight.copy_(torch.tensor([[1.0], [0.0], [0.0]]))  # (b, 0, 0)
    model.edge_linear.weight.fill_(1)
    assert model.node_positions is not None
    table = model.node_positions.table
    table.fill_(1)
    table[: len(inputs)] = inputs[:, None].to(table)  # x + P at input nodes
    table[: len(inputs), BIAS] -= spec.input_value
    table[-spec.layout[-1] :] = 0
    for layer in cast("Sequence[Any]", model.layers):
        layer.forward_message.node_linear.weight.copy_(torch.diag(torch.tensor([0.0, 0.0, 1.0])))
        layer.forward_message.edge_linear.weight.copy_(torch.eye(3))
        update = layer.update.layers[0]
        update.linear.weight.zero_()
        update.linear.weight[:, BIAS] = 1
        update.linear.weight[[PRE, POST], 3 + POST] = 1
        by_role = update.factor
        _set_constant(by_role.branches[by_role.index["input"]].mlp)
        row = torch.zeros(6, dtype=torch.float64)
        row[[BIAS, 3 + POST]] = 1
        hidden = by_role.index["hidden"]
        if activation == "relu":
            _set_step(by_role.branches[hidden].phi, row, (POST,))
        elif fitted_range is None:
            by_role.branches[hidden] = Quotient(*_odd(spec))
        else:
            _fit_quotient(by_role.branches[hidden], row, _odd(spec), fitted_range)
    return model


@torch.no_grad()
def node_states(model: ScaleGMN, params: NetParams) -> list[Tensor]:
    """The features of all nodes after the last layer, per layer l = 0..L, [B, n_l, d].

    Scale models read canonical networks; their features are taken back to the networks as they are given.
    """
    kept: list[Tensor] = []
    hook = model.layers[-1].register_forward_hook(lambda module, inputs, outputs: kept.append(outputs[0]))
    try:
        model(params)
    finally:
        hook.remove()
    states = kept[0].unflatten(0, (len(params), -1)).split(params.spec.layout, dim=1)
    element = model.canonical(params)[1]
    return list(states) if element is None else element.inverse().act_on_nodes(states, params.spec)


class StreamSlopes(nn.Module):
    """The factors of both streams at hidden nodes, exactly: sigma(z) / z at a, sigma'(z) at delta, else 1.

    Args:
        function: sigma.
        slope: sigma'(0).
    """

    def __init__(self, function: Callable[[Tensor], Tensor], slope: float) -> None:
        super().__init__()
        self.quotient, self.function = Quotient(function, slope), function

    def forward(self, x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """X and Y [B, n, 9] -> [B, n, 3] each."""
        g = self.quotient(None, x.flatten(0, 1)).unflatten(0, x.shape[:2])
        z = (x[..., BIAS] + x[..., 3 + POST]).detach()
        with torch.enable_grad():
            z = z.requires_grad_()
            (slope,) = torch.autograd.grad(self.function(z).sum(), z)
        return g, torch.stack([torch.ones_like(slope), torch.ones_like(slope), slope], dim=-1)


@torch.no_grad()
def backward_scalegmn(spec: NetSpec) -> StreamScaleGMN:
    """A ScaleGMN with a contravariant stream in float64, which computes activations and then all gradients of networks
    of `spec`; `gradients` reads them.

    The contravariant state of a node is (t, 0, delta); t, of output nodes, is what the squared error compares with.
    Edges hold w in all components of the first stream, and the gradient of w in the second.

    Args:
        spec: as in `forward_scalegmn`; relu or tanh.

    Raises:
        ValueError: the networks are others.
    """
    activation = _activation(spec)
    dims, group = (4, 4), ACTIVATIONS[activation].group
    widths = StreamWidths((1, 1, 1), (1, 1, 1))
    model = StreamScaleGMN(group, widths, 3, 2 * spec.num_layers + 1, True, dims, "relu", False).double()
    for parameter in model.parameters():
        parameter.zero_()
    column = torch.tensor([[1.0], [0.0], [0.0]])
    node_linears, edge_linears = (cast("Sequence[Any]", maps) for maps in (model.node_linears, model.edge_linears))
    node_linears[0].weight.copy_(column)
    node_linears[1].weight.copy_(column)
    edge_linears[0].weight.fill_(1)
    to_state = torch.diag(torch.tensor([0.0, 0.0, 1.0]))
    eye = torch.eye(3)
    for layer in cast("Sequence[Any]", model.layers):
        for messages in (layer.covariant_along, layer.contravariant_against):  # sum w_ij a_j and sum w_ij delta_i
            messages.node_linear.weight.copy_(to_state)
            messages.edge_linear.weight.copy_(eye)
        update = layer.node_update
        update.covariant_linear.weight[:, BIAS] = 1
        update.covariant_linear.weight[[PRE, POST], 3 + POST] = 1
        update.contravariant_linear.weight[POST, 6 + POST] = 1
        # input nodes hold their value as b, so z = a = b; output nodes z = a = b + m, delta = z - t
        update.io_linear.weight[:3, BIAS] = 1
        update.io_linear.weight[[PRE, POST], 3 + POST] = 1
        update.io_linear.weight[3 + BIAS, 9 + BIAS] = 1
        update.io_linear.weight[5, [BIAS, 3 + POST]] = 1
        update.io_linear.weight[5, 9 + BIAS] = -1
        _set_constant(update.io_factors)
        if activation == "relu":
            row = torch.zeros(update.factors.mlp.linears[0].in_features, dtype=torch.float64)
            row[[BIAS, 3 + POST]] = 1  # z / ||X||, from the first of the three invariants
            _set_step(update.factors.mlp, row, (POST, 3 + POST))
        else:
            update.factors = StreamSlopes(*_odd(spec))
        edges = layer.edge_update
        edges.edge_linears[0].weight[:3] = eye  # w stays
        edges.node_linears[0].weight[3:] = torch.tensor([[0.0, 0.0, 1.0]] * 3)  # a_j
        edges.node_linears[1].weight[3:] = torch.tensor([[0.0, 0.0, 1.0]] * 3)  # delta_i
        _set_constant(edges.mlp)
    return model


def raw_streams(params: NetParams, inputs: Tensor, targets: Tensor) -> StreamGraph:
    """What `backward_scalegmn` reads: biases, inputs at input nodes, targets at output nodes, and weights.

    Args:
        params: B networks.
        inputs: [n_0].
        targets: [n_L].
    """
    spec, num_networks = params.spec, len(params)
    values = [inputs.expand(num_networks, -1), *params.biases]
    x = torch.cat(values, dim=1)[..., None]
    y = torch.zeros_like(x)
    y[:, -spec.layout[-1] :, 0] = targets
    none = torch.zeros_like(x)
    edges = [
        Streams(w[..., None], torch.zeros_like(w)[..., None], torch.zeros_like(w)[..., None]) for w in params.weights
    ]
    return StreamGraph(Streams(x, y, none), edges, spec.layout)


@torch.no_grad()
def gradients(model: StreamScaleGMN, params: NetParams, inputs: Tensor, targets: Tensor) -> NetParams:
    """The gradients of ||output - target||^2 / 2 with respect to all weights and biases, as `backward_scalegmn`
    computes them: delta of the nodes, and delta_i a_j of the edges."""
    graph = model(raw_streams(params, inputs, targets))
    delta = graph.nodes.contravariant[..., POST].split(graph.layout, dim=1)
    return params.replace(
        weights=tuple(block.contravariant[..., POST] for block in graph.edges), biases=tuple(delta[1:])
    )


def _activation(spec: NetSpec) -> str:
    """The one activation of a chain of linear layers."""
    names = {layer.activation for layer in spec.layers[:-1]}
    if spec.is_cnn or not spec.is_chain or len(names) != 1 or not names <= set(_SYMMETRIES):
        raise ValueError(f"expected a chain of linear layers with one of {', '.join(_SYMMETRIES)}, found {spec}")
    return names.pop()


def _odd(spec: NetSpec) -> tuple[Callable[[Tensor], Tensor], float]:
    """sigma of the hidden layers, and sigma'(0)."""
    layer = spec.layers[0]
    function = ACTIVATIONS[layer.activation].function
    return (lambda z: function(z, layer.w0)), layer.w0 if layer.activation == "sine" else 1.0


def _set_constant(mlp: MLP) -> None:
    """MLP(x) = 1."""
    for linear in mlp.linears:
        linear.weight.zero_()
        linear.bias.zero_()
    mlp.linears[-1].bias.fill_(1)


def _set_step(mlp: MLP, row: Tensor, components: Sequence[int]) -> None:
    """MLP(x) = 1 - relu(1 - relu(K row . x)) at some components, 1 at all others."""
    _set_constant(mlp)
    first, second, last = mlp.linears
    first.weight[0] = STEEPNESS * row
    second.weight[0, 0] = -1
    second.bias[0] = 1
    for component in components:
        last.weight[component, 0] = -1


_NUM_FITTED = 256
"""Hidden units of the fitted phi."""


def _fit_quotient(
    layer: InvariantLayer, row: Tensor, odd: tuple[Callable[[Tensor], Tensor], float], largest: float
) -> None:
    """Sets rho and phi of an invariant layer such that component `POST` is nearly sigma(z) / z for |z| <= `largest`:
    the last Linear of rho by least squares, on hidden units silu(u z + c) with random u and c."""
    rho = cast("MLP", layer.invariant.rho)
    generator = torch.Generator().manual_seed(0)
    slopes = 4 * torch.randn(_NUM_FITTED, generator=generator, dtype=torch.float64)
    shifts = largest * slopes * (2 * torch.rand(_NUM_FITTED, generator=generator, dtype=torch.float64) - 1)
    rho.linears[0].weight.copy_(slopes[:, None] * row)
    rho.linears[0].bias.copy_(shifts)
    z = torch.linspace(0, largest, 4001, dtype=torch.float64) + 1e-9
    silu = nn.functional.silu
    hidden = silu(z[:, None] * slopes + shifts) + silu(-z[:, None] * slopes + shifts)
    design = torch.cat([hidden, torch.ones_like(z)[:, None]], dim=1)
    solution = torch.linalg.lstsq(design, (odd[0](z) / z)[:, None], driver="gelsd").solution[:, 0]
    rho.linears[1].weight.zero_()
    rho.linears[1].bias.zero_()
    rho.linears[1].weight[0] = solution[:-1]
    rho.linears[1].bias[0] = solution[-1] / 2  # rho(x) + rho(-x)
    phi = layer.phi
    _set_constant(phi)
    phi.linears[0].weight[0, 0], phi.linears[0].weight[1, 0] = 1, -1
    phi.linears[1].weight[POST, 0], phi.linears[1].weight[POST, 1] = 1, -1  # silu(v) - silu(-v) = v
    phi.linears[1].bias[POST] = 0
