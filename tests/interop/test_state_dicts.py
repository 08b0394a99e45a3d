"""Networks from state dicts: which entries are layers, in which order, under any names."""

import argparse
import datetime
import json
import pickle
import tarfile
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

import scalegmn
from scalegmn.interop.network_files import InputOptions, find_sources, read_source
from scalegmn.interop.state_dicts import read_network, stored_network
from scalegmn.networks.evaluate import evaluate


def names(network):
    return [layer.name for layer in network.layers]


def mlp(*widths):
    """A chain of linear layers with tanh."""
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    return nn.Sequential(*(module for layer in layers for module in (layer, nn.Tanh())))[:-1]


def test_names(generator):
    """By name where names say what is what; else by the number of axes."""
    tensors = [torch.randn(*shape, generator=generator) for shape in ((5, 2), (5,), (3, 5), (3,))]
    weights, biases = tensors[::2], tensors[1::2]
    grid = {"grid": torch.zeros(9, 2), "steps": torch.tensor(7), "name": "net"}
    expected = scalegmn.NetParams.from_tensors([w[None] for w in weights], [b[None] for b in biases], "tanh")
    for state in (
        {
            **grid,
            "net.0.weight": weights[0],
            "net.0.bias": biases[0],
            "net.2.weight": weights[1],
            "net.2.bias": biases[1],
        },
        {"bias_a": biases[0], "bias_b": biases[1], "weight_a": weights[0], "weight_b": weights[1]},
        {"weights.0": weights[0], "biases.0": biases[0], "weights.1": weights[1], "biases.1": biases[1]},
        {"W0": weights[0], "b0": biases[0], "W1": weights[1], "b1": biases[1], "steps": torch.tensor(7)},
    ):
        params = scalegmn.from_state_dict(state, "tanh")
        assert params.spec == expected.spec
        assert torch.equal(params.flatten(), expected.flatten())


def test_convolutions():
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, (1, 5)), nn.ReLU(), nn.Linear(3, 2))
    params = scalegmn.from_state_dict(module.state_dict(), "relu")
    assert str(params.spec) == "CNN [1, 4, 3, 2] (relu)"
    assert params.spec.kernel == (3, 5)


def test_module_computes_the_same(generator):
    module = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3, bias=False)).double()
    x = torch.randn(7, 2, generator=generator, dtype=torch.float64)
    params = scalegmn.from_state_dict(module.state_dict(), "tanh")
    torch.testing.assert_close(evaluate(params, x)[0], module(x), rtol=0, atol=1e-12)
    assert [layer.bias for layer in params.spec.layers] == [True, False]


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4 * 4, 2)), torch.rand(2, 1, 6, 6)),
        (nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 5, 2)), torch.rand(2, 2, 7)),
    ],
    ids=["two axes", "one axis"],
)
def test_all_positions_of_an_image(module, x):
    """A linear layer after a convolution reads all positions, as `from_module` reads them."""
    network = stored_network(module.state_dict())
    params, expected = network.params("relu"), scalegmn.from_module(module, x)
    assert params.spec == expected.spec
    assert torch.equal(params.flatten(), expected.flatten())
    assert any("positions each" in note for note in network.notes)


@pytest.mark.parametrize(
    ("change", "exact"),
    [
        (lambda layer: parametrizations.weight_norm(layer), False),
        (lambda layer: nn.utils.weight_norm(layer), False),
        (lambda layer: nn.utils.weight_norm(layer, dim=None), False),
        (lambda layer: parametrizations.spectral_norm(layer), False),
        (lambda layer: nn.utils.spectral_norm(layer), False),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), True),
        (lambda layer: layer.bfloat16(), True),
    ],
    ids=["weight_norm", "old weight_norm", "one weight_norm", "spectral_norm", "old spectral_norm", "pruning", "types"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_effective_weights(change, exact):
    torch.manual_seed(0)  # a spectral norm that starts at singular vectors far from its own divides by almost nothing
    module = mlp(2, 6, 3).double()
    change(module[0])
    module.eval()
    for _ in range(20):  # the old spectral norm computes its weight when called
        module[0](torch.zeros(1, 2, dtype=module[0].weight.dtype))
    params = scalegmn.from_state_dict(module.state_dict(), "tanh")
    difference = (params.weights[0][0] - module[0].weight.double()).abs().max()
    assert difference <= (0 if exact else 1e-12)


@pytest.mark.parametrize("place", [("state_dict",), ("model_state_dict",), ("model",), ("net",), ("model", "ema")])
def test_nested(place):
    module = mlp(2, 4, 3)
    content = {**module.state_dict(), "criterion.weight": torch.ones(3), "1.steps": torch.tensor(7)}
    for name in reversed(place):
        content = {name: content, "epoch": 3, "optimizer": {"state": {0: {"weight": torch.zeros(9, 9)}}}}
    network = stored_network(content)
    assert network.params("tanh").spec.layout == (2, 4, 3)
    assert f"the network is the entry {'.'.join(place)!r}" in network.notes
    assert "not read: criterion.weight" in network.notes


@pytest.mark.parametrize(
    ("place", "beside"),
    [
        (("checkpoint", "weights", "net"), {}),
        (("state",), {"rng": torch.get_rng_state(), "optimizer": {"state": {0: {"exp_avg": torch.zeros(4, 2)}}}}),
        (("state_dict",), {"mean_picture": torch.zeros(3, 4, 4)}),
    ],
)
def test_nested_beside_other_tensors(place, beside):
    """States of random numbers, of optimizers, or of data are no networks."""
    content = mlp(2, 4, 3).state_dict()
    for name in reversed(place):
        content = {name: content, "epoch": 3}
    network = stored_network({**content, **beside})
    assert network.params("tanh").spec.layout == (2, 4, 3)
    assert network.notes == (f"the network is the entry {'.'.join(place)!r}",)


@pytest.mark.parametrize("name", ["ema", "state_dict_ema", "teacher"])
def test_networks_beside_the_one_that_is_read_are_said(name):
    first, second = (mlp(2, 4, 3).state_dict() for _ in range(2))
    network = stored_network({name: second, "model": first})
    assert torch.equal(network.layers[0].weight, first["0.weight"])
    assert network.notes[1] == f"not read: the entries {name}, which hold matrices too"


def test_several_networks_in_one_state_dict_are_said():
    """Of which the second can read the first."""
    networks = {"generator": mlp(2, 4, 1), "critic": mlp(1, 4, 1)}
    network = stored_network(nn.ModuleDict(networks).state_dict())
    assert network.notes == ("the layers of generator, critic are taken as one network, each after the other",)
    assert stored_network(nn.ModuleDict({"body": mlp(2, 4, 4), "head": nn.Linear(4, 1)}).state_dict()).notes == ()


def test_numbers_that_are_not_read_are_said():
    """What may be a frequency or a scale; counts of steps are none."""
    state = {**mlp(2, 4, 3).state_dict(), "0.omega": torch.tensor(30.0), "0.num_batches_tracked": torch.tensor(3)}
    assert stored_network(state).notes == ("not read: 0.omega",)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "no tensors: found nothing, expected a state dict"),
        ({"state_dict": {}}, "no tensors: found the entries state_dict, expected a state dict"),
        ({"bias_a": torch.zeros(3)}, "0 weights and 1 biases"),
        (nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).state_dict(), "^1: a norm or a PReLU, .*from_module"),
        (nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)).state_dict(), "^1: a norm or a PReLU, .*from_module"),
        (nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, affine=False)).state_dict(), "^1: a norm or a PReLU"),
        (
            nn.ModuleDict({"a": nn.Linear(2, 3), "shortcut": nn.Linear(3, 3)}).state_dict(),
            "shortcut.weight: a layer beside others, .*from_module",
        ),
        (nn.ModuleDict({"a": nn.Linear(2, 2), "to_q": nn.Linear(2, 2)}).state_dict(), "to_q.weight: attention"),
        (nn.Sequential(nn.Linear(2, 3), nn.PReLU()).state_dict(), "^1: a norm or a PReLU, .*from_module"),
        (nn.RNN(3, 3).state_dict(), "weight_ih_l0: a recurrent layer"),
        (nn.GRUCell(3, 3).state_dict(), "weight_ih: a recurrent layer"),
        (nn.MultiheadAttention(4, 2).state_dict(), "in_proj_weight: attention, .*from_module"),
        (nn.MultiheadAttention(4, 2, kdim=4, vdim=3).state_dict(), "q_proj_weight: attention"),
        (
            {"generator": mlp(2, 4, 3).state_dict(), "critic": mlp(3, 1).state_dict()},
            r"no tensors: found the entries generator, critic, .* as in torch.save\(content\['generator'\], FILE\)",
        ),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.ConvTranspose2d(2, 3, 3)).state_dict(), "^1: a transposed conv.*from_m"),
        (nn.Conv3d(1, 2, 3).state_dict(), "layer: a convolution over volumes"),
        ({"b.weight": torch.zeros(3, 2), "b.bias": torch.zeros(3).long()}, "b.bias is not a dense tensor"),
        (
            {"b.weight": torch.zeros(3, 2), "b.bias": torch.zeros(2)},
            r"b: found a bias of shape \(2,\), expected \(3,\)",
        ),
        ({"b.weight": torch.zeros(3, 2).to(torch.float8_e4m3fn)}, "b.weight is not a dense tensor .* of two bytes"),
        (
            {"b.weight": torch.zeros(3, 2), "b.bias": torch.tensor(1.0)},
            r"b: found a bias of shape \(\), expected \(3,\)",
        ),
        ({"a.weight_g": torch.zeros(3, 1)}, "a: the weight is made up of weight_g in an unknown way"),
        (
            {"b.weight": torch.zeros(3, 5), "a.weight": torch.zeros(4, 2)},
            "layer 1: a reads 2 neurons, but b has 3; the layers are b, a, and no order of them is a chain",
        ),
    ],
)
def test_others_are_refused(state, message):
    with pytest.raises(ValueError, match=message):
        scalegmn.from_state_dict(state, "relu")


# The order of layers


def test_numbers_count_as_numbers(tmp_path):
    state = nn.Sequential(*(nn.Linear(3, 3) for _ in range(12))).state_dict()
    save_file(state, tmp_path / "net.safetensors")
    assert names(read_network(tmp_path / "net.safetensors")) == [str(number) for number in range(12)]


def renamed(module, layer_names):
    linears = [layer for layer in module if isinstance(layer, nn.Linear)]
    named = zip(layer_names, linears, strict=True)
    return {f"{name}.{key}": tensor for name, layer in named for key, tensor in layer.state_dict().items()}


@pytest.mark.parametrize("torch_file", [False, True])
def test_the_only_order_that_fits(tmp_path, torch_file):
    """`last_layer` comes before `layers.0` by name; shapes tell."""
    module, order = mlp(2, 5, 5, 1), ["layers.0", "layers.1", "last_layer"]
    state = renamed(module, order)
    state = {name: state[name] for name in sorted(state)}
    path = tmp_path / ("net.pth" if torch_file else "net.safetensors")
    torch.save(state, path) if torch_file else save_file(state, path)
    network = read_network(path)
    assert names(network) == order
    assert "the layers stand in the order layers.0,layers.1,last_layer, the only one that fits" in network.notes
    assert torch.equal(
        network.params("tanh").flatten(), scalegmn.from_state_dict(module.state_dict(), "tanh").flatten()
    )


def test_several_orders_fit(tmp_path):
    """Names that are no numbers, equal widths, and a file without an order: the user must say."""
    module, order = mlp(3, 3, 3, 3), ["fc_one", "fc_two", "fc_three"]
    state = renamed(module, order)
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=r"net.safetensors: the layers fit in several orders, such as .*--layers"):
        read_network(tmp_path / "net.safetensors")
    network = read_network(tmp_path / "net.safetensors", order)
    assert names(network) == order
    assert names(stored_network(state)) == order  # a state dict has an order
    with pytest.raises(ValueError, match="layers: found fc_one, fc_1, expected different ones of fc_one"):
        read_network(tmp_path / "net.safetensors", ["fc_one", "fc_1"])


@pytest.mark.parametrize("order", [("input", "hidden", "output"), ("out", "fc1", "fc2"), ("2", "1", "0")])
def test_other_orders_are_said(order):
    """A state dict may be sorted, or have the order in which a module registers layers, which is not that of use."""
    network = stored_network(renamed(mlp(3, 3, 3, 3), order))
    assert names(network) == [*order]
    words = f"the layers are taken as they stand, {', '.join(order)}; --layers names them in another order"
    assert network.notes == (words,)
    assert stored_network(renamed(mlp(3, 3, 3, 3), ("fc1", "fc2", "fc10"))).notes == ()


def test_orders_of_modules_are_proposed(tmp_path):
    save_file(renamed(mlp(2, 4, 4, 4, 1), ("enc.0", "enc.2", "dec.0", "dec.2")), tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=r"in their order, as in layers enc\.0,enc\.2,dec\.0,dec\.2 "):
        read_network(tmp_path / "net.safetensors")


def test_layers_that_are_left_out_are_said():
    network = stored_network(renamed(mlp(3, 3, 3, 3), ("a", "b", "c")), ["a", "b"])
    assert (names(network), network.notes) == (["a", "b"], ("not read: c",))


@pytest.mark.parametrize(
    ("module", "note"),
    [
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), "a convolution; a transposed one"),
        (nn.ModuleDict({"0": nn.Bilinear(3, 4, 5), "1": nn.Linear(5, 2)}), "along one axis; a bilinear layer"),
    ],
)
def test_what_shapes_do_not_tell(module, note):
    (found,) = stored_network(module.state_dict()).notes
    assert found.startswith("0: taken as ")
    assert note in found


def test_tensors_that_are_no_layers_are_named():
    with pytest.raises(ValueError, match=r"^1 weights and 0 biases, .*: found grid \[3, 4, 5\]; scalegmn.from_module"):
        stored_network({"grid": torch.zeros(3, 4, 5)})


# Files


@pytest.mark.parametrize("name", ["net.pt", "net.PTH", "net.ckpt", "net.bin", "net.pth.tar", "net.Safetensors"])
def test_endings(tmp_path, name):
    module = mlp(2, 4, 3)
    state = module.state_dict()
    save_file(state, tmp_path / name) if name == "net.Safetensors" else torch.save(state, tmp_path / name)
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "._net.pth").write_text("nothing")
    sources, passed_over = find_sources([str(tmp_path)])
    assert [source.name for source in sources] == [str(tmp_path / name)]
    assert passed_over == [f"{tmp_path}: not read: 1 .txt"]
    params, _ = read_source(sources[0].name, InputOptions("tanh", 30.0))
    assert torch.equal(params.flatten(), scalegmn.from_state_dict(state, "tanh").flatten())


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(tmp_path, suffix):
    """Several files with an index are one network, beside others."""
    state = mlp(2, 4, 3).state_dict()
    entries = list(state)
    save, parts = (save_file if suffix == "safetensors" else torch.save), (entries[:1], entries[1:])
    for number, chosen in enumerate(parts, 1):
        save({name: state[name] for name in chosen}, tmp_path / f"model-0000{number}-of-00002.{suffix}")
    save(state, tmp_path / f"other.{suffix}")
    places = {name: f"model-0000{1 + int(name != entries[0])}-of-00002.{suffix}" for name in entries}
    index = tmp_path / f"model.{suffix}.index.json"
    index.write_text("\ufeff" + json.dumps({"weight_map": places}))
    sources, _ = find_sources([str(tmp_path)])
    assert [source.name for source in sources] == [str(index), str(tmp_path / f"other.{suffix}")]
    with pytest.raises(ValueError, match=r"a part of a network; name the file \*.index.json that lists all parts"):
        read_network(tmp_path / places[entries[0]])
    params, _ = read_source(str(index), InputOptions("tanh", 30.0))
    assert torch.equal(params.flatten(), scalegmn.from_state_dict(state, "tanh").flatten())
    for outside in (f"../other.{suffix}", f"gone.{suffix}"):
        index.write_text(json.dumps({"weight_map": places | {entries[0]: outside}}))
        with pytest.raises(ValueError, match=f"index.json: names '{outside}', expected a file of tensors in"):
            read_network(index)


def test_no_network_in_a_folder(tmp_path):
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(ValueError, match="no network in this folder, expected files"):
        find_sources([str(tmp_path)])


def test_numbers_of_numpy(tmp_path):
    state = mlp(2, 4, 3).state_dict()
    values = {"accuracy": np.float64(0.9), "epoch": np.int64(3), "done": np.bool_(True), "name": np.str_("net")}
    arrays = {"history": [np.arange(6.0).reshape(2, 3)], "order": np.asfortranarray([[1, 2], [3, 4]])}
    values = {**values, **arrays, "random": np.random.RandomState(0).get_state()}
    torch.save({"state_dict": state, **values}, tmp_path / "net.pt")
    content = read_network(tmp_path / "net.pt").content
    assert (content["accuracy"], content["name"]) == (0.9, "net")
    np.testing.assert_array_equal(content["history"][0], arrays["history"][0])
    np.testing.assert_array_equal(content["order"], arrays["order"])
    np.testing.assert_array_equal(content["random"][1], values["random"][1])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("net.pth", b"version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS"),
        ("net.safetensors", b"version https://git-lfs.github.com/spec/v1\noid", "pointer of Git LFS"),
        ("net.pt", b"<!DOCTYPE html><html>", "a web page: get the file again"),
        ("net.pth", b"", "empty"),
        ("net.ckpt", b"\x89HDF\r\n\x1a\n", "HDF5"),
        ("net.bin", b"\x08\x07", "not written by torch.save"),
    ],
)
def test_other_kinds_of_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: refused, not a file of plain tensors \(.*{message}"):
        read_network(tmp_path / name)


def test_files_under_the_suffix_of_others(tmp_path):
    state = mlp(2, 4, 3).state_dict()
    save_file(state, tmp_path / "net.pth")
    torch.save(state, tmp_path / "net.safetensors")
    np.savez(tmp_path / "arrays.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    (tmp_path / "arrays.npz").rename(tmp_path / "arrays.pt")
    for name, message in (
        ("net.pth", "of safetensors: name it .safetensors"),
        ("net.safetensors", "written by torch.save: name it .pth"),
        ("arrays.pt", "not written by torch.save"),
    ):
        with pytest.raises(ValueError, match=rf"{name}: refused, .* \({message}\)$"):
            read_network(tmp_path / name)


@pytest.mark.parametrize("is_archive", [False, True])
def test_pickles_of_others(tmp_path, is_archive):
    """Neither torch's advice nor a part of it."""
    path = tmp_path / "net.pth"
    path.write_bytes(pickle.dumps({"weight": np.zeros((3, 2))}))
    if is_archive:
        with tarfile.open(tmp_path / "net.tar", "w") as archive:
            archive.add(path, "pickle")
        (tmp_path / "net.tar").rename(path)
    kind = "not written by torch.save" if is_archive else r"a pickle, or of torch.save's old format.*, FILE\)"
    message = rf"net.pth: refused, not a file of plain tensors \({kind}\)$"
    with pytest.raises(ValueError, match=message):
        read_network(path)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (datetime.datetime(2024, 1, 1), "datetime.datetime"),
        (nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (print, "__builtin__.print"),
    ],
)
def test_objects_are_named(tmp_path, value, kind):
    """Which entry, and of which type; in one line without colours."""
    torch.save({"state_dict": mlp(2, 4, 3).state_dict(), "extra": {"hparams": value}}, tmp_path / "net.pt")
    message = f"net.pt: entry 'hparams' holds a {kind}, whose code"
    with pytest.raises(ValueError, match=message) as error:
        read_network(tmp_path / "net.pt")
    assert "\n" not in str(error.value)
    assert "\x1b" not in str(error.value)
