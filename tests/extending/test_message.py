"""A message function that the package does not know (message.py), and networks of a scalar group that it does not know
(square.py): both forms agree, symmetries hold, and a model trains through the usual command."""

import sys
from pathlib import Path

import pytest
import torch
from contract import build, error, flat
from covering import product_params

import scalegmn
from scalegmn.cli import main
from scalegmn.engine.chunks import ChunkPlan
from scalegmn.models.scalegmn import EquivariantNetConfig, ScaleGMNConfig, execution
from scalegmn.networks import ACTIVATIONS, LayerSpec, NetSpec
from scalegmn.nn.messages import MESSAGES
from scalegmn.symmetry.groups import GroupElement

FOLDER = Path(__file__).parent
DIRECTIONS, OUTPUTS = ["forward", "bidirectional"], ["vector", "parameters"]


@pytest.fixture(autouse=True)
def imported(monkeypatch):
    """message.py and square.py imported, for the time of a test."""
    for registry, name in ((MESSAGES, "message"), (ACTIVATIONS, "square")):
        monkeypatch.setattr(registry, "_items", dict(registry._items))
        monkeypatch.delitem(sys.modules, f"extending.{name}", raising=False)
    import extending.message
    import extending.square  # noqa: F401


def mlp(layout, *names):
    layers = zip(layout, layout[1:], [*names, "identity"], strict=False)
    return NetSpec(tuple(LayerSpec(a, b, None, name) for a, b, name in layers))


def config_of(symmetry, direction, **options):
    options = {"num_layers": 3, "hidden_dim": 5, "out_dim": 4} | options
    return ScaleGMNConfig(symmetry=symmetry, direction=direction, **options)


def results(model, params):
    """Outputs and gradients."""
    output = flat(model(params))
    return [output, *torch.autograd.grad(output.square().sum(), list(model.parameters()), materialize_grads=True)]


def assert_forms_agree(model, params, monkeypatch):
    """The plain form, dense blocks in pieces, and the sparse graph, whole and in pieces, to 1e-9."""
    expected = results(model, params)
    for engine, chunks in (("plain", ChunkPlan()), ("fast", ChunkPlan()), ("fast", ChunkPlan(9, False))):
        for sparse in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(model, "engine", engine)
                patch.setattr(model, "chunks", lambda *args, chunks=chunks: chunks)
                if sparse:
                    patch.setattr(execution, "is_chain", lambda model, spec: False)
                for found, wanted in zip(results(model, params), expected, strict=True):
                    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9 * (1 + wanted.abs().max().item()))


@pytest.mark.parametrize(
    ("symmetry", "direction", "output"),
    product_params(["sign", "scale", "hetero", "permutation"], DIRECTIONS, OUTPUTS),
)
def test_message(symmetry, direction, output, random_params, generator, monkeypatch):
    spec = NetSpec.mlp([2, 4, 3, 2], {"scale": "relu", "permutation": "gelu"}.get(symmetry, "hetero"))
    if symmetry == "sign":
        spec = NetSpec.mlp([2, 4, 3, 2], "sine")
    params = random_params(spec, 4, [1, 2, 1, 2] if spec.is_hetero else None)
    options = EquivariantNetConfig(positions=symmetry != "permutation")
    config = config_of(symmetry, direction, output=output, message_function="gated", message=options, normalize=False)
    model = build(config, spec)
    assert {type(layer.forward_message).__name__ for layer in model.layers} == {"GatedMessage"}
    assert_forms_agree(model, params, monkeypatch)
    element = GroupElement.sample(params, generator, scale=symmetry != "permutation")
    assert error(model, params, element) <= 1e-9


def test_it_reads_the_receiver(random_params):
    spec = NetSpec.mlp([2, 4, 3, 2], "sine")
    model, params = build(config_of("sign", "forward", message_function="gated"), spec), random_params(spec, 2)
    before = model(params)
    gate = model.layers[0].forward_message.gate
    with torch.no_grad():
        gate.linears[0].weight[:, :5] = 0  # of the receiver
    assert (model(params) - before).abs().max() > 1e-6


def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError, match=r"message_function: found 'gate', expected one of scale, product, concat, gated"
    ):
        config_of("sign", "forward", message_function="gate")


@pytest.mark.parametrize(
    ("names", "direction", "output", "message"),
    product_params(
        [("square", "square"), ("square", "relu"), ("tanh", "square")], DIRECTIONS, OUTPUTS, [None, "gated"]
    ),
    ids=str,
)
def test_squares(names, direction, output, message, random_params, generator, monkeypatch):
    """sigma(q z) = q^2 sigma(z): exact, with q of both signs, alone and beside other activations."""
    params = random_params(mlp([2, 4, 3, 2], *names), 4)
    readout = "full_graph" if output == "vector" else "last_layer"
    config = config_of("hetero", direction, output=output, readout=readout, message_function=message)
    model = build(config, params.spec)
    assert any(".sign0_scale2." in name for name in model.state_dict())
    for _ in range(3):
        element = GroupElement.sample(params, generator, decades=0.5)
        assert error(model, params, element) <= 1e-9
    assert_forms_agree(model, params, monkeypatch)
    for layer, name in enumerate(names):
        if name != "square":
            scales = [torch.ones_like(q) for q in element.scales]
            scales[layer] *= {"relu": -1, "tanh": 2}[name]
            assert error(model, params, GroupElement(element.permutations, tuple(scales))) > 1e-6


def test_other_groups_are_refused(random_params):
    model = build(config_of("hetero", "forward"), mlp([2, 4, 3, 2], "tanh", "relu"))
    with pytest.raises(ValueError, match="the model was built for networks of the scalar groups sign, scale"):
        model(random_params(mlp([2, 4, 3, 2], "tanh", "square"), 2))


def test_trains_through_the_usual_command(small_home, tmp_path, monkeypatch):
    monkeypatch.chdir(small_home)
    words = ["--import", str(FOLDER / "message.py"), "--scalegmn_args.message_function=gated"]
    monkeypatch.setattr(MESSAGES, "_items", {name: item for name, item in MESSAGES._items.items() if name != "gated"})
    main(["train", "classification", "--conf", "conf.yml", f"--run_dir={tmp_path / 'run'}", *words])
    model = scalegmn.load(tmp_path / "run")
    layers = model._load(model.spec).layers
    assert type(layers[0].forward_message).__name__ == "GatedMessage"
