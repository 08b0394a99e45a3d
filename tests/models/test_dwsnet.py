import re

import golden
import pytest
import torch
from contract import Contract, build, flat
from memory import share_of_budget

from scalegmn.models.dwsnet import DWSNetConfig
from scalegmn.networks import LayerSpec, NetSpec
from scalegmn.symmetry.groups import GroupElement

SET_LAYERS = {"sab": "attention", "ds": "deep_set"}


def config_of(case):
    """Our configuration of a published model."""
    published = case["hyper_parameters"]
    return DWSNetConfig(
        output="parameters" if case["task"] == "editing" else "vector",
        hidden_dim=published["hidden_dim"],
        num_hidden=published["n_hidden"],
        set_layer=SET_LAYERS[published["set_layer"]],
        num_heads=published["num_heads"] if published["set_layer"] == "sab" else 1,
        reduction=published["reduction"],
        num_linears=published["n_fc_layers"],
        batch_norm=published["bn"],
        num_readout_linears=published.get("n_out_fc", 1),
        normalize=False,
    )


def ours(state, model):
    """Published parameters by our names."""
    found, num_layers, config = {}, model.spec.num_layers, model.config
    period = 4 if config.batch_norm else 3
    kinds = {"weight": 0, "bias": num_layers}
    for name, tensor in state.items():
        name = re.sub(r"^(layers\.)+", "layers.", name)
        if name.startswith("clf."):
            sizes = model.layers[-1].out_dims
            order = [*range(1, num_layers - 1), 0, num_layers - 1, *range(num_layers, 2 * num_layers)]
            if name == "clf.layer.0.weight":  # its columns are in another order
                parts = dict(zip(order, tensor.split([sizes[t] for t in order], 1), strict=True))
                tensor = torch.cat([parts[t] for t in range(2 * num_layers)], 1)
            found[name.replace("clf.layer.", "readout.")] = tensor
            continue
        index, rest = re.fullmatch(r"layers\.(\d+)\.(.*)", name).groups()
        if norm := re.fullmatch(r"(weight|biase)s_bn\.(\d+)\.(.*)", rest):
            kind, layer, rest = norm.groups()
            t = int(layer) + (num_layers if kind == "biase" else 0)
            found[f"norms.{int(index) // period}.{t}.{rest}"] = tensor
            continue
        source_kind, target_kind, s, t, rest = re.fullmatch(
            r"(weight|bias)_to_(weight|bias)\.layers\.(\d+)_(\d+)\.(.*)", rest
        ).groups()
        source, target = int(s) + kinds[source_kind], int(t) + kinds[target_kind]
        kept = tuple(sorted(set(model.layers[0].axes[source].sets) & set(model.layers[0].axes[target].sets)))
        if lattice := re.match(r"lin_(all|n|m|both)\.", rest):
            kept = {"all": kept, "n": kept[1:], "m": kept[:1], "both": ()}[lattice[1]]
        terms = [term[:3] for term in model.layers[0].terms]
        rest = re.sub(r"^(set_layer\.|layer\.|lin_\w+\.)+", "", rest)
        for old, new in {"mab.fc_o.": "last.", "Gamma.": "own.", "Lambda.": "all."}.items():
            rest = rest.replace(old, new)
        place = f"layers.{int(index) // period}.maps.{terms.index((source, target, kept))}"
        if joined := re.fullmatch(r"mab\.fc_([qkv])\.(weight|bias)", rest):
            found.setdefault(f"{place}.query_key_value.{joined[2]}", {})[joined[1]] = tensor
        else:
            found[f"{place}.{rest}"] = tensor
    return {
        name: torch.cat([tensor[letter] for letter in "qkv"]) if isinstance(tensor, dict) else tensor
        for name, tensor in found.items()
    }


@pytest.mark.parametrize("path", golden.cases("dwsnet"), ids=lambda path: path.stem)
def test_published_outputs(path):
    case, state, params, output = golden.read(path, "sine")
    model = config_of(case).build(params.spec)
    golden.assert_published(model, ours(state, model), params, output, case["parameter_count"])


@pytest.mark.parametrize(("output", "count"), [("vector", 552_650), ("parameters", 424_447)])
def test_published_parameter_counts(output, count):
    model = DWSNetConfig(output=output).build(NetSpec.mlp([2, 32, 32, 1], "sine"))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


SPECS = [
    NetSpec.mlp([2, 5, 2], "relu"),
    NetSpec.mlp([2, 5, 4, 2], "sine", 6.0),
    NetSpec.mlp([3, 4, 3, 5, 1], "hetero"),
]
BALANCED = {"set_layer": "deep_set", "reduction": "mean", "batch_norm": False, "products": True, "init": "balanced"}
CONFIGS = [
    DWSNetConfig(hidden_dim=8, num_hidden=1, num_heads=2),
    DWSNetConfig(hidden_dim=8, num_hidden=2, num_heads=4, full=True, batch_norm=False, num_readout_linears=2),
    DWSNetConfig(hidden_dim=9, num_hidden=1, set_layer="deep_set", num_heads=3, reduction="mean", num_linears=2),
    DWSNetConfig(hidden_dim=8, num_hidden=1, num_heads=1, output="parameters", normalize=False),
    DWSNetConfig(hidden_dim=8, num_hidden=1, set_layer="deep_set", num_heads=1, output="parameters", heads=2),
    DWSNetConfig(hidden_dim=8, num_hidden=1, num_heads=2, products=True),
    DWSNetConfig(hidden_dim=8, num_hidden=2, num_heads=1, **BALANCED),
]


class TestDWSNet(Contract):
    @pytest.fixture(params=[(config, spec) for config in CONFIGS for spec in SPECS], ids=str)
    def case(self, request):
        return request.param

    def test_every_parameter_is_used(self, model, nets):
        """With one sign or the other of the Linear before the attention's ReLU, which otherwise may leave nothing."""
        params, used = nets(4), set()
        for _ in range(2):
            for name, parameter in model.named_parameters():
                parameter.grad = None
                if ".last." in name:
                    parameter.data.neg_()
            flat(model(params)).square().sum().backward()
            used |= {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        assert used == {name for name, _ in model.named_parameters()}


def test_a_layer_is_equivariant_and_its_maps_are_all_there(random_params, generator):
    """Every tensor that a layer gives moves with the neurons, and depends on every tensor that it reads."""
    spec = SPECS[2]
    model = build(DWSNetConfig(hidden_dim=4, num_heads=2, normalize=False), spec)
    params = random_params(spec, 3, [1, 2, 3])
    element = GroupElement.sample(params, generator, scale=False)
    layer = model.layers[0]
    moved, plain = layer(model._tensors(element.act(params))), layer(model._tensors(params))
    for t, axes in enumerate(layer.axes):
        for dim, node_layer in enumerate(axes.sets, 1):
            order = element.permutations[node_layer - 1]
            index = order.reshape(len(order), *(-1 if d == dim else 1 for d in range(1, plain[t].ndim)))
            plain[t] = plain[t].gather(dim, index.expand_as(plain[t]))
        torch.testing.assert_close(moved[t], plain[t], rtol=1e-10, atol=1e-12)
    read = [tensor.clone().requires_grad_() for tensor in model._tensors(params)]
    for new in layer(read):
        gradients = torch.autograd.grad(new.square().sum(), read, retain_graph=True)
        assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_full_maps_tell_outputs_apart():
    """Published, what the last weights get from others but their neighbours is the same for each output."""
    for full in (False, True):
        model = build(DWSNetConfig(hidden_dim=4, num_heads=2, full=full), NetSpec.mlp([2, 3, 4, 3], "sine"))
        sizes = {(t.source, t.target): m for t, m in zip(model.layers[0].terms, model.layers[0].maps, strict=True)}
        assert sizes[1, 2].last.out_features == (12 if full else 4)  # W_2 -> W_3
        assert sizes[3, 2][-1].out_features == (12 if full else 4)  # b_1 -> W_3
        assert sizes[4, 2].last.out_features == 12  # b_2 -> W_3


def test_a_single_value_is_normalised_by_what_was_seen(random_params):
    """A batch of one network has one last bias, of which there is no variance."""
    spec = NetSpec.mlp([2, 4, 1], "sine")
    model = DWSNetConfig(hidden_dim=4, num_heads=2).build(spec).double().train()
    model(random_params(spec, 1)).sum().backward()
    norm = model.norms[0][3]
    assert (norm.running_mean == 0).all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_training_does_not_depend_on_batch_mates_without_batch_norm(random_params):
    spec = NetSpec.mlp([2, 4, 1], "sine")
    model = DWSNetConfig(hidden_dim=4, num_heads=2, batch_norm=False).build(spec).double().train()
    params = random_params(spec, 3)
    torch.testing.assert_close(model(params)[:1], model(params[:1]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", [DWSNetConfig(), DWSNetConfig(set_layer="deep_set", output="parameters")], ids=str)
@pytest.mark.parametrize("layout", [[2, 32, 32, 1], [3, 9, 9, 9, 9, 3]], ids=str)
def test_memory_is_estimated(config, layout, random_params):
    spec = NetSpec.mlp(layout, "sine")
    params = random_params(spec, 4).map(lambda tensor: tensor.float())
    assert 0.1 < share_of_budget(config.build(spec), params) < 1


@pytest.mark.parametrize(("output", "scale"), [("vector", 1), ("parameters", 1e-4)])
def test_published_initial_values(output, scale):
    model = DWSNetConfig(output=output).build(NetSpec.mlp([2, 8, 8, 1], "sine"))
    for name, parameter in model.layers[1].named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().max() <= 1e-4
        else:
            parts = parameter.chunk(3) if "query_key_value" in name else [parameter]
            b, a = parts[0].shape
            expected = scale * (2 / (a + b) * 2 * a / b) ** 0.5
            assert parameter.std().item() == pytest.approx(expected, rel=0.15), name


def test_wrong_configurations_and_networks_are_refused():
    with pytest.raises(ValueError, match=r"dwsnet_args.num_hidden: found 0.*num_heads: found 3, expected a divisor of"):
        DWSNetConfig(num_hidden=0, num_heads=3)
    with pytest.raises(ValueError, match="set_layer: found 'sab', expected one of"):
        DWSNetConfig(set_layer="sab")
    with pytest.raises(ValueError, match="hidden_dim: found 5, expected an even one for products"):
        DWSNetConfig(hidden_dim=5, num_heads=5, products=True)
    for key, value in {"products": False, "reduction": "max", "output": "parameters", "num_linears": 2}.items():
        with pytest.raises(ValueError, match=rf"^dwsnet_args.{key}: found {value}, expected \w+ for init balanced$"):
            DWSNetConfig(**BALANCED | {key: value})
    for spec in (NetSpec.mlp([2, 1], "sine"), NetSpec((LayerSpec(1, 3, (3, 3), "relu"), LayerSpec(3, 4)))):
        with pytest.raises(ValueError, match="dwsnet_args: expected networks of linear layers, at least one hidden"):
            DWSNetConfig().build(spec)
