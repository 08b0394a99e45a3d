"""Outputs of the published models, float64 (tests/fixtures)."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from scalegmn.official import load_official
from scalegmn.spec import NetParams
from scalegmn.symmetry.checks import assert_invariant, spread

CASES = sorted(Path(__file__).parent.glob("fixtures/*.safetensors"))


def read(path):
    """scalegmn_args, published state dict, input networks, published output."""
    with safe_open(path, "pt") as file:
        case = json.loads(file.metadata()["case"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}
    weights, biases = (
        [tensors[f"input.{kind}.{layer}"] for layer in range(len(case["layer_layout"]) - 1)]
        for kind in ("weight", "bias")
    )
    params = NetParams.from_tensors(weights, biases, case["activations"])
    return case["scalegmn_args"], state, params, tensors["output"]


def test_cases_are_there():
    assert {path.stem for path in CASES} >= {"mnist_cls-forward", "mnist_cls-bidirectional", "mnist_cls-full_graph"}


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_published_outputs(path, generator):
    scalegmn_args, state, params, output = read(path)
    model = load_official(scalegmn_args, state)
    tolerance = 1e-10 * spread(output)
    assert (model(params) - output).abs().max() < tolerance
    alone = torch.cat([model(params[index : index + 1]) for index in range(len(params))])
    assert (alone - output).abs().max() < tolerance
    assert_invariant(model, params, generator, scale=scalegmn_args["symmetry"] != "permutation")


def test_every_published_parameter_matters_where_it_is_loaded():
    """Changing any loaded parameter changes the output: nothing is matched to the wrong place and then ignored."""
    scalegmn_args, state, params, output = read(CASES[0])
    model = load_official(scalegmn_args, state)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            kept = parameter.clone()
            parameter += 0.1 * torch.randn_like(parameter)
            assert (model(params) - output).abs().max() > 0, name
            parameter.copy_(kept)
    assert (model(params) - output).abs().max() < 1e-10 * spread(output)


def test_problems_are_named():
    scalegmn_args, state, _, _ = read(CASES[0])
    with pytest.raises(ValueError, match=r"lacks 1 parameters.*readout.mlp.linears.1.bias"):
        load_official(scalegmn_args, {k: v for k, v in state.items() if k != "gnn.readout.rho.fc.1.bias"})
    changed = copy.deepcopy(scalegmn_args)
    changed["gnn_args"]["update_as_act"] = True
    changed["mlp_args"]["skip"] = True
    with pytest.raises(ValueError, match=r"gnn_args.update_as_act.*mlp_args.skip"):
        load_official(changed, state)
