"""EdgeInputs, parameters and outputs of published models, float64 (tests/fixtures/<model>)."""

import json
from pathlib import Path

import torch
from contract import flat
from safetensors import safe_open

from scalegmn.networks import LayerSpec, NetParams, NetSpec
from scalegmn.symmetry.measure import spread

FIXTURES = Path(__file__).parent / "fixtures"


def cases(model):
    """The files of a model."""
    return sorted((FIXTURES / model).glob("*.safetensors"))


def read(path, activation):
    """What the case is, its parameters by published name, input networks, output [B, numbers]."""
    with safe_open(path, "pt") as file:
        case = json.loads(file.metadata()["case"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}
    layers = range(sum(name.startswith("input.weight.") for name in tensors))
    weights, biases = ([tensors[f"input.{kind}.{layer}"] for layer in layers] for kind in ("weight", "bias"))
    output = tensors.get("output")
    if output is None:
        deltas = [tensors[f"output.delta.{kind}.{layer}"] for kind in ("weight", "bias") for layer in layers]
        output = torch.cat([delta.flatten(1) for delta in deltas], 1)
    return case, state, NetParams.from_tensors(weights, biases, activation), output.flatten(1)


def read_mixed(path):
    """The same of networks with architectures of their own: what the case is, parameters, networks, output [B, 1]."""
    with safe_open(path, "pt") as file:
        case = json.loads(file.metadata()["case"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}
    nets = []
    for k, layout in enumerate(case["layer_layouts"]):
        depth = len(layout) - 1
        weights, biases = ([tensors[f"net{k}.{kind}.{i}"][None] for i in range(depth)] for kind in ("weight", "bias"))
        names = case.get("activations", {k: ["relu"] * (depth - 1)})[k]
        names = [*("identity" if name == "none" else name for name in names), "identity"]
        sources = [*case.get("residual_source", {k: [-1] * (depth - 1)})[k], -1]
        layers = (
            LayerSpec(w.shape[2], w.shape[1], tuple(w.shape[3:]) or None, name, residual=None if s < 0 else s)
            for w, name, s in zip(weights, names, sources, strict=True)
        )
        nets.append(NetParams(NetSpec(tuple(layers)), tuple(weights), tuple(biases)))
    return case, state, nets, tensors["output"]


def assert_published(model, state, params, output, count):
    """The model, given published parameters by our names, has their output, their number and no others."""
    model.double().eval()
    expected = model.state_dict()
    assert set(state) == set(expected)
    model.load_state_dict({name: tensor.reshape(expected[name].shape) for name, tensor in state.items()})
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert (flat(model(params)) - output).abs().max() < 1e-10 * spread(output)
    alone = torch.cat([flat(model(params[index : index + 1])) for index in range(len(params))])
    assert (alone - output).abs().max() < 1e-10 * spread(output)
