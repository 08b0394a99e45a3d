"""Outputs of the published models, float64 (tests/fixtures)."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from scalegmn.official import load_official, translate_config
from scalegmn.spec import NetParams
from scalegmn.symmetry.checks import assert_invariant, invariance_error, spread

CASES = sorted(Path(__file__).parent.glob("fixtures/*.safetensors"))


def read(path):
    """scalegmn_args, published state dict, input networks, published output (of editing models: [B, parameters])."""
    with safe_open(path, "pt") as file:
        case = json.loads(file.metadata()["case"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}
    weights, biases = (
        [tensors[f"input.{kind}.{layer}"] for layer in range(len(case["layer_layout"]) - 1)]
        for kind in ("weight", "bias")
    )
    params = NetParams.from_tensors(weights, biases, case["activations"])
    if case["scalegmn_args"]["equivariant"]:
        layers = range(params.spec.num_layers)
        output = [tensors[f"output.{kind}.{layer}"] for kind in ("weight", "bias") for layer in layers]
        return case["scalegmn_args"], state, params, flat(output)
    return case["scalegmn_args"], state, params, tensors["output"]


def flat(changes):
    """[B, parameters] of a list of [B, ...]."""
    return torch.cat([change.flatten(1) for change in changes], 1)


def test_all_cases_are_there():
    assert len(CASES) == 24


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_published_outputs(path, generator):
    scalegmn_args, state, params, output = read(path)
    model = load_official(scalegmn_args, dict(reversed(state.items())))  # in any order
    editing = scalegmn_args["equivariant"]

    def apply(params):
        found = model(params)
        return flat([*found[0], *found[1]]) if editing else found

    tolerance = 1e-10 * spread(output)
    assert (apply(params) - output).abs().max() < tolerance
    alone = torch.cat([apply(params[index : index + 1]) for index in range(len(params))])
    assert (alone - output).abs().max() < tolerance
    symmetry, direction = scalegmn_args["symmetry"], scalegmn_args["direction"]
    if editing:
        return
    error = invariance_error(model, params, generator, scale=symmetry != "permutation")
    if symmetry in ("sign", "permutation"):
        assert error < 1e-9
    else:  # the epsilon beside norms; and, against the edges, no inverse of the weight
        assert error > (1e-2 if direction == "bidirectional" else 0)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_published_configs_train_our_exact_models(path, generator):
    """The same configuration without the checkpoint is exactly invariant."""
    scalegmn_args, _, params, _ = read(path)
    config = translate_config(scalegmn_args)
    if config.output == "vector":
        model = config.build(params.spec).double().eval()
        assert_invariant(model, params, generator, scale=config.symmetry != "permutation", tolerance=1e-8)


def test_every_published_parameter_matters_where_it_is_loaded():
    """Changing any loaded parameter changes the output: nothing is matched to the wrong place and then ignored."""
    (path,) = (path for path in CASES if path.stem == "mnist_cls-bidirectional")
    scalegmn_args, state, params, output = read(path)
    model = load_official(scalegmn_args, state)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            kept = parameter.clone()
            parameter += 0.1 * torch.randn_like(parameter)
            assert (model(params) - output).abs().max() > 0, name
            parameter.copy_(kept)
    assert (model(params) - output).abs().max() < 1e-10 * spread(output)


def test_problems_are_named():
    (path,) = (path for path in CASES if path.stem == "mnist_cls-forward")
    scalegmn_args, state, _, _ = read(path)
    with pytest.raises(ValueError, match=r"lacks 1 parameters.*readout.mlp.linears.1.bias"):
        load_official(scalegmn_args, {k: v for k, v in state.items() if k != "gnn.readout.rho.fc.1.bias"})
    with pytest.raises(ValueError, match=r"has a parameter extra.weight"):
        load_official(scalegmn_args, state | {"extra.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"node_linear.weight: shape \(1,\), expected"):
        load_official(scalegmn_args, state | {"construct_graph.proj_bias.weight": torch.zeros(1).double()})
    changed = copy.deepcopy(scalegmn_args)
    changed["gnn_args"]["update_as_act"] = True
    changed["mlp_args"]["skip"] = True
    with pytest.raises(ValueError, match=r"gnn_args.update_as_act.*mlp_args.skip"):
        load_official(changed, state)
