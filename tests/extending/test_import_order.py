"""What zoos and models keep of activations does not depend on which modules are imported, nor in which order."""

import pytest
import torch

from scalegmn.models.ng_gnn import NGGNNConfig
from scalegmn.models.ng_t import NGTConfig
from scalegmn.models.scalegmn import ScaleGMNConfig
from scalegmn.networks import ACTIVATIONS, BUILT_IN, Activation, NetParams, NetSpec, ScalarGroup, register_activation
from scalegmn.networks.evaluate import evaluate
from scalegmn.symmetry.measure import assert_invariant
from scalegmn.zoos.loader import hidden_activation
from scalegmn.zoos.shards import Shards
from scalegmn.zoos.zoo_format import Networks, open_zoo, write_zoo

SQUARE = Activation("square", lambda z, w0: z.square(), ScalarGroup(True, True, sign_exponent=0, exponent=2))
CUBE = Activation("cube", lambda z, w0: z**3, ScalarGroup(True, True, sign_exponent=1, exponent=3))
NAMES = ("square", "relu", "cube", "tanh", "cube")


@pytest.fixture
def imported(monkeypatch):
    """imported(*activations): these alone are registered besides the built-in ones, in this order."""
    monkeypatch.setattr(ACTIVATIONS, "_items", dict(ACTIVATIONS._items))

    def register(*activations):
        ACTIVATIONS._items = {name: ACTIVATIONS[name] for name in BUILT_IN}
        for activation in activations:
            register_activation(activation)

    register()
    return register


def networks(names=NAMES):
    """One network per name, from [2, 4, 3]."""
    draw = torch.Generator().manual_seed(0)
    shapes = ((4, 2), (3, 4)), ((4,), (3,))
    tensors = ([torch.randn(len(names), *s, generator=draw, dtype=torch.float64) for s in of] for of in shapes)
    return NetParams.from_tensors(*tensors, names)


def outputs(params):
    return evaluate(params, torch.linspace(-1, 1, 10, dtype=torch.float64).view(5, 2))


def hetero_model(spec, config=ScaleGMNConfig, **options):
    torch.manual_seed(0)
    return config(hidden_dim=8, num_layers=2, **options).build(spec).double().eval()


def test_zoos_hold_names(imported, tmp_path):
    imported(SQUARE, CUBE)
    params = networks()
    before = outputs(params)
    write_zoo(tmp_path / "zoo", [Networks((params,), {})], {"train": torch.arange(5)}, {})
    shards = Shards(tmp_path / "other", {"recipe": 1}, 1)
    shards.write(0, params)
    imported(CUBE, SQUARE)
    for stored in (open_zoo(tmp_path / "zoo").params, shards.read(0).nets[0]):
        assert hidden_activation(stored).tolist() == list(NAMES)
        assert torch.equal(outputs(stored), before)


def test_a_zoo_whose_activation_is_not_imported_is_refused(imported, tmp_path):
    imported(SQUARE, CUBE)
    write_zoo(tmp_path / "zoo", [Networks((networks(),), {})], {"train": torch.arange(5)}, {})
    imported(SQUARE)
    with pytest.raises(ValueError, match=r"zoo.json: extra_activations: unknown 'cube', .* \(--import\)$"):
        open_zoo(tmp_path / "zoo")


def test_descriptions_of_built_in_activations_name_none(imported):
    imported(SQUARE)
    spec = networks(("relu", "tanh")).spec
    assert spec == NetSpec.mlp([2, 4, 3], "hetero", 1.0)
    assert list(spec.to_dict()) == ["layers"]
    named = networks(("square", "tanh")).spec
    assert named.to_dict()["extra_activations"] == ["square"]
    assert NetSpec.from_dict(named.to_dict()) == named
    assert "(hetero, square)" in str(named)


def test_batches_of_other_names_are_not_joined(imported):
    imported(SQUARE, CUBE)
    with pytest.raises(ValueError, match=r"expected networks of one spec, found .*cube, hetero.*hetero, square"):
        NetParams.cat([networks(("cube", "relu")), networks(("square", "relu"))])


@pytest.mark.parametrize("names", [("square", "cube"), ("square", "square"), ("relu",)])
def test_extra_activations_are_sorted_and_not_built_in(names, imported):
    imported(SQUARE, CUBE)
    with pytest.raises(ValueError, match=r"extra_activations: found .*, expected sorted names that are not built in"):
        NetSpec(NetSpec.mlp([2, 4, 3], "hetero").layers, names)


def test_envelopes_name_all_that_occur(imported):
    imported(SQUARE, CUBE)
    specs = [NetSpec.mlp([2, 4, 3], name) for name in ("relu", "square")] + [networks(("cube", "relu")).spec]
    assert NetSpec.envelope(specs).extra_activations == ("cube", "square")
    assert NetSpec.envelope(specs[:1]) == specs[0]
    also = Activation("also_square", SQUARE.function, SQUARE.group)
    envelopes = []
    for order in ((SQUARE, also), (also, SQUARE)):
        imported(*order)
        envelopes.append(NetSpec.envelope([NetSpec.mlp([2, 4, 3], name) for name in ("square", "also_square")]))
    assert envelopes[0] == envelopes[1]


def test_an_import_changes_no_model(imported):
    """Networks of built-in activations: the same parameters, in name and value."""
    spec = networks(("relu", "tanh")).spec
    before = hetero_model(spec, symmetry="hetero").state_dict()
    imported(SQUARE, CUBE)
    after = hetero_model(spec, symmetry="hetero").state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any("scale2" in name for name in after)


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
def test_branches_are_those_of_the_activations_that_occur(direction, imported, generator):
    imported(SQUARE, CUBE)
    params = networks()
    model = hetero_model(params.spec, symmetry="hetero", direction=direction)
    names = {part for name in model.state_dict() for part in name.split(".")}
    assert {"sign", "sign0_scale2", "sign1_scale3", "sign0_scale3"} & names == {"sign", "sign0_scale2", "sign1_scale3"}
    assert_invariant(model, params, generator, tolerance=1e-9)
    answer = model(params)
    imported(Activation("another", torch.sin), CUBE, SQUARE)
    again = hetero_model(NetSpec.from_dict(params.spec.to_dict()), symmetry="hetero", direction=direction)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(networks()), answer, rtol=1e-12, atol=1e-12)


def test_a_model_refuses_networks_whose_scalars_it_lacks(imported):
    imported(SQUARE, CUBE)
    model = hetero_model(networks(("square", "relu")).spec, symmetry="hetero")
    assert model(networks(("relu", "tanh"))).isfinite().all()
    with pytest.raises(ValueError, match=r"built for networks of the scalar groups .*sign0_scale2, found another"):
        model(networks(("cube", "relu")))


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("config", [NGGNNConfig, NGTConfig])
def test_embedding_of_activations(config, engine, imported):
    """Every activation that occurs has a row of its own; those of the built-in ones stay."""
    imported(SQUARE, CUBE)
    params = networks(("square", "relu", "cube"))
    model = config(activation_embedding=True).build(params.spec).double().eval()
    model.engine = engine
    assert model.graph.activations.shape[0] == 9
    alike = NetParams.cat([params[:1]] * 3).replace(activation=params.activation)
    answers = model(alike)
    assert not torch.allclose(answers[0], answers[1])
    assert not torch.allclose(answers[0], answers[2])
    with torch.no_grad():
        model.graph.activations[-1] += 1  # of the square, the last in the order of names
    changed = (model(alike) - answers).abs().amax(1)
    assert changed[0] > 1e-6
    assert (changed[1:] < 1e-12).all()
    imported(CUBE, SQUARE)
    again = config(activation_embedding=True).build(NetSpec.from_dict(params.spec.to_dict())).double().eval()
    again.load_state_dict(model.state_dict())
    again.engine = engine
    torch.testing.assert_close(again(alike), model(alike), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", [NGGNNConfig, NGTConfig])
def test_networks_without_embedding_are_refused(config, imported):
    imported(SQUARE)
    model = config(activation_embedding=True).build(networks(("relu", "tanh")).spec).double()
    with pytest.raises(ValueError, match="activation_embedding: there is none for square; use false"):
        model(networks(("square", "relu")))
