"""The slow, obvious twin of ScaleGMN: the equations as they are written, with the parameters of a model of ours.

Every feature is multiplied out and repeated on every edge, every MLP sees the concatenation of its inputs.
"""

from dataclasses import replace

import torch

from scalegmn.networks import ACTIVATIONS, NetParams
from scalegmn.networks.scalar_groups import SIGNS
from scalegmn.nn.equivariant import ByRole, EquivariantLayer, EquivariantNet, PlainLayer, SineUpdate
from scalegmn.nn.invariant import (
    AbsoluteValue,
    ByActivation,
    InvariantLayer,
    NodeContext,
    ScaleInvariant,
    SignInvariant,
)
from scalegmn.nn.messages import ConcatMessage, EquivariantEdgeUpdate


def join(*parts):
    """The concatenation of parts that broadcast."""
    shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*shape, part.shape[-1]) for part in parts], dim=-1)


def mlp(module, x):
    """Linear, LayerNorm, activation, ..., Linear."""
    for norm, linear in zip(module.norms, module.linears, strict=False):
        x = module.activation(norm(linear(x)))
    return module.linears[-1](x)


def inv(module, x, num_odd=0):
    """The invariant map."""
    if isinstance(module, SignInvariant):
        return mlp(module.rho, x) + mlp(module.rho, -x)
    if isinstance(module, AbsoluteValue):
        return x.abs()
    if isinstance(module, ScaleInvariant):
        size = x.norm(dim=-1, keepdim=True) + module.epsilon
        return x / torch.where(size > 0, size, 1)
    assert isinstance(module, ByActivation)
    return torch.cat([inv(module.sign, x[:num_odd]), inv(module.scale, x[num_odd:])])


def net(module, rows, x, *extras):
    """Equivariant nets and what they are made of."""
    if isinstance(module, ByRole):
        return net(module.branches[module.index[rows.role]], rows, x, *extras)
    if isinstance(module, PlainLayer):
        return mlp(module.mlp, join(x, *extras))
    if isinstance(module, InvariantLayer):
        return mlp(module.phi, join(inv(module.invariant, x, rows.odd), *(extras if module.extra_dim else ())))
    if isinstance(module, ByActivation):
        parts = ((module.sign, x[: rows.odd]), (module.scale, x[rows.odd :]))
        return torch.cat([net(half, rows, part) for half, part in parts])
    if isinstance(module, EquivariantLayer):
        return module.linear(x) * net(module.factor, rows, x, *extras)
    if isinstance(module, SineUpdate):
        parts = x.split(module.dim, dim=-1)
        x = sum(part(y) for part, y in zip(module.parts, parts, strict=True)) if module.parts else x
        return torch.sin(30 * module.linear(x))
    assert isinstance(module, EquivariantNet)
    for index, layer in enumerate(module.layers):
        new = net(layer, rows, x, *extras)
        x = new + module.skips[index](x) if module.skips else new
    return x


def message(module, rows, x_j, e, *extras):
    """Aggregated messages of senders [B, S, d] along edges [B, R, S, d]."""
    if isinstance(module, ConcatMessage):
        sent = mlp(module.mlp, join(e, x_j[:, None]))
    else:
        sent = net(module.net, rows, module.node_linear(x_j)[:, None] * module.edge_linear(e), *extras)
    return sent.sum(2) if module.aggregator == "add" else sent.mean(2)


def edge_update(module, num_odd, e, x_j, x_i):
    """New features of edges [B, R, S, d] with senders [B, S, d] and receivers [B, R, d]."""
    x_j, x_i = x_j[:, None], x_i[:, :, None]
    if not isinstance(module, EquivariantEdgeUpdate):
        return mlp(module.phi, join(e, x_j, x_i))
    return module.linear(e) * mlp(module.phi, join(*(inv(module.invariant, x, num_odd) for x in (x_j, x_i))))


def edges_of(model, linear, raw):
    """Embedded edges."""
    edges = [linear(block) for block in raw]
    if model.edge_positions is None:
        return edges
    embedded = []
    for e, p, role in zip(edges, model.edge_positions(), model.spec.roles[1:], strict=True):
        if model.config.symmetry == "permutation":
            embedded.append(e + p)
        elif model.edge_position_net is not None:
            embedded.append(net(model.edge_position_net, NodeContext(role), e, p))
        else:
            embedded.append(e * p)
    if model.edge_position_map is None:
        return embedded
    return [(m @ e[..., None])[..., 0] for m, e in zip(model.edge_position_map.rows(), embedded, strict=True)]


def model(module, params):
    """ScaleGMN's output; the networks of a mixed batch must come odd ones first."""
    spec, config = params.spec, module.config
    num_odd = 0
    if config.symmetry == "hetero":
        names = [spec.layers[0].activation] * len(params)
        if params.activation is not None:
            names = [ACTIVATIONS.at(index) for index in params.activation.tolist()]
        num_odd = sum(ACTIVATIONS[name].group == SIGNS for name in names)
    params, element = module.canonical(module.normalized(params))
    positions = module.node_positions() if module.node_positions else None
    nodes = module._embed_nodes(params.node_features(), positions)
    raw = params.edge_features()
    edges = backward = edges_of(module, module.edge_linear, raw)
    if module.backward_edge_linear is not None:
        inverse = []
        for block, weight, bias in zip(raw, params.weights, params.biases, strict=True):
            row = (weight.flatten(2).square().sum(2) + bias.square()).sqrt()[..., None, None]
            size = block.square().sum(-1, keepdim=True).sqrt()
            size = torch.where(size > 1e-3 * row, size, 1e-3 * row)
            inverse.append(block / torch.where(row > 0, size, 1) ** 2)
        backward = edges_of(module, module.backward_edge_linear, inverse)
    backward = [block.transpose(1, 2) for block in backward]
    for layer in module.layers:
        new = [None] * len(nodes)
        for n in layer.node_layers:
            rows = NodeContext(spec.roles[n], num_odd)
            received = []
            for function, sender, block in (
                (layer.forward_message, n - 1, edges[n - 1] if n else None),
                (layer.backward_message, n + 1, backward[n] if n < spec.num_layers else None),
            ):
                if function is None:
                    continue
                if block is None:
                    received.append(torch.zeros_like(nodes[n]))
                    continue
                extras = []
                if layer.message_positions:
                    extras = [positions[sender][None] if layer.bidirectional else positions[n][:, None]]
                received.append(message(function, rows, nodes[sender], block, *extras))
            x = join(nodes[n], *received)
            if config.symmetry == "permutation":
                new[n] = mlp(layer.update.mlp, x)
            else:
                new[n] = net(layer.update, rows, x, *([positions[n]] if layer.update_positions else []))
            new[n] = new[n] if layer.skip is None else new[n] + layer.skip(nodes[n])
        ends = [(nodes[n], nodes[n + 1]) for n in range(spec.num_layers)]
        if layer.edge_update is not None:
            edges = [
                edge_update(layer.edge_update, num_odd, e, low, high) if n + 1 in layer.edge_blocks else None
                for n, (e, (low, high)) in enumerate(zip(edges, ends, strict=True))
            ]
        if layer.backward_edge_update is not None:
            backward = [
                edge_update(layer.backward_edge_update, num_odd, e, high, low)
                if n + 1 in layer.backward_edge_blocks
                else None
                for n, (e, (low, high)) in enumerate(zip(backward, ends, strict=True))
            ]
        nodes = new
    if module.readout is not None:
        return module.readout(nodes, num_odd)
    changes = NetParams.from_features(spec, nodes, edges)
    changes = changes if element is None else element.inverse().act(changes)
    return replace(
        changes,
        weights=tuple(change * scale for change, scale in zip(changes.weights, module.weight_scales, strict=True)),
        biases=tuple(change * scale for change, scale in zip(changes.biases, module.bias_scales, strict=True)),
    )
