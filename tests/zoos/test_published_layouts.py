"""The very numbers of a published dataset reach the model, with the right label, split and canonicalisation."""

import json
import math
import random
import shutil
from dataclasses import replace

import pytest
import torch
from commands import run_here
from published import CNN_LAYOUT, MNIST, save, siren, write_cifar, write_cnns, write_fmnist, write_mnist

from scalegmn.networks import NetParams, NetSpec
from scalegmn.symmetry.canonicalize import canonicalize
from scalegmn.zoos import convert
from scalegmn.zoos.fit.cnn_zoo import CnnRecipe, make_cnn_zoo
from scalegmn.zoos.loader import DataConfig, load_splits, open_data
from scalegmn.zoos.published.cnns import write_published
from scalegmn.zoos.published.mnist_inrs import mnist_splits
from scalegmn.zoos.zoo_format import Networks, open_zoo, write_zoo


@pytest.fixture(autouse=True)
def small_shards(monkeypatch, tmp_path):
    """Several shards, and no cache outside the test's folder."""
    monkeypatch.setattr(convert, "SHARD", 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user cache"))


def network(state):
    """The state dict as a batch of one."""
    tensors = [value[None] for value in state.values() if isinstance(value, torch.Tensor)]
    return NetParams.from_tensors(tensors[::2], tensors[1::2], "sine", 30.0)


def assert_same(nets, states, canonical):
    """Row k of a split is state dict k, canonical or not, to the bit."""
    params = nets.read(slice(None))
    assert len(params) == len(states)
    for row, state in enumerate(states):
        expected = canonicalize(network(state), ("phase",) if canonical else ())
        for found, own in zip((*params.weights, *params.biases), (*expected.weights, *expected.biases), strict=True):
            assert torch.equal(found[row], own[0])
    moved = any(not torch.equal(canonicalize(network(s), ("phase",)).biases[0], network(s).biases[0]) for s in states)
    assert moved  # so that the comparison can fail
    assert ((30 * params.biases[0]).abs().max() <= math.pi / 2 + 1e-4) == canonical


@pytest.mark.parametrize("canonical", [True, False])
def test_mnist(tmp_path, generator, canonical):
    states = write_mnist(tmp_path, generator)
    for given in (str(tmp_path / "mnist_splits.json"), None):
        if given is None:
            shutil.move(tmp_path / "mnist_splits.json", tmp_path / "mnist-inrs" / "mnist_splits.json")
        config = DataConfig(str(tmp_path / "mnist-inrs"), "labeled_mnist_inr", given, switch_to_canon=canonical)
        for _ in range(2):  # first use and later uses
            zoo, splits = load_splits(config, "label")
            images = {"train": (7, 6, 5, 3, 2, 0), "val": (4, 1), "test": (2, 1, 0)}  # the file names the last first
            for name, own in images.items():
                part = "testing" if name == "test" else "training"
                assert_same(splits[name], [states[part, image] for image in own], canonical)
                assert splits[name].labels.tolist() == [MNIST[part][image] for image in own]
                first = 60_000 if name == "test" else 0
                assert zoo.columns["image"][zoo.splits[name]].tolist() == [first + image for image in own]
    assert open_data(replace(config, dataset="mnist_inr_edit")).path == zoo.path


def test_mnist_without_splits(tmp_path, generator):
    write_mnist(tmp_path, generator)
    root = tmp_path / "mnist-inrs"
    splits = mnist_splits(root, val_size=2, seed=0)
    assert splits == mnist_splits(root, val_size=2, seed=0)
    assert any(splits != mnist_splits(root, val_size=2, seed=seed) for seed in range(1, 5))
    assert {name: len(found["path"]) for name, found in splits.items()} == {"train": 6, "val": 2, "test": 3}
    assert splits["test"]["label"] == ["7", "2", "1"]
    assert all((root / path).is_file() for found in splits.values() for path in found["path"])
    assert len({path for found in splits.values() for path in found["path"]}) == 11
    with pytest.raises(ValueError, match=r"8 training networks leave none .*scalegmn zoo splits .*--val_size N"):
        load_splits(DataConfig(str(root), "labeled_mnist_inr"), "label")


def test_fmnist(tmp_path, generator):
    states = write_fmnist(tmp_path / "fmnist_inrs", generator)
    config = DataConfig(str(tmp_path / "fmnist_inrs"), "labeled_fashion_mnist_inr")
    _, splits = load_splits(config, "label")
    for name, numbers in {"train": (10, 2, 33, 4), "val": (7, 1), "test": (0, 12, 5)}.items():
        assert_same(splits[name], [states[name, n] for n in numbers], canonical=True)
        assert splits[name].labels.tolist() == [(3 * n) % 10 for n in numbers]


@pytest.mark.parametrize("extra_aug", [0, 1, 2])
def test_cifar(tmp_path, generator, extra_aug):
    states = write_cifar(tmp_path, generator)
    zoo, splits = load_splits(DataConfig(str(tmp_path), "cifar_inr", extra_aug=extra_aug), "label")
    views = [None, *range(extra_aug)]
    for name, images in {"train": (0, 1, 2, 44_999), "val": (45_000, 49_999), "test": (50_000, 59_999)}.items():
        expected = {(view, image) for image in images for view in (views if name == "train" else [None])}
        found = splits[name].read(slice(None)).biases[2]
        own = [next(k for k in expected if torch.equal(states[k]["net.net.2.bias"], bias)) for bias in found]
        assert set(own) == expected
        assert len(own) == len(expected)
        assert_same(splits[name], [states[k] for k in own], canonical=True)
        assert splits[name].labels.tolist() == [image % 7 for _, image in own]
        assert zoo.columns["image"][zoo.splits[name]].tolist() == [image for _, image in own]


def test_cifar_that_lacks_fits(tmp_path, generator):
    write_cifar(tmp_path, generator)
    with pytest.raises(ValueError, match=r"data.extra_aug: found 20, .*has no randinit_smaller_aug2_<label>s"):
        open_data(DataConfig(str(tmp_path), "cifar_inr", extra_aug=20))


@pytest.mark.parametrize("activation", [None, "relu", "tanh"])
def test_small_cnns(tmp_path, activation):
    weights, metrics, order = write_cnns(tmp_path)
    zoo, splits = load_splits(DataConfig(str(tmp_path), "cifar10", activation_function=activation), "test_accuracy")
    final = [row for row in order if metrics[row]["step"] == 86]
    half = len(final) // 2
    first = list(range(half))
    random.Random(0).shuffle(first)
    expected = {"train": first[: int(0.8 * half)], "val": first[int(0.8 * half) :], "test": range(half, len(final))}
    for name, positions in expected.items():
        rows = [final[k] for k in positions if activation in (None, metrics[final[k]]["config.activation"])]
        params = splits[name].read(slice(None))
        assert len(params) == len(rows)
        assert splits[name].labels.tolist() == pytest.approx([metrics[row]["test_accuracy"] for row in rows])
        start = 0
        for index, (varname, shape) in enumerate(CNN_LAYOUT):
            size = math.prod(shape)
            value = torch.from_numpy(weights[rows, start : start + size]).reshape(len(rows), *shape)
            start += size
            layer = index // 2
            if varname.endswith("bias:0"):
                assert torch.equal(params.biases[layer], value)
                continue
            for row in range(len(rows)):  # [h, w, in, out] -> [out, in, h, w]; [in, out] -> [out, in]
                own = value[row].T if len(shape) == 2 else value[row].movedim((3, 2), (0, 1))
                assert torch.equal(params.weights[layer][row], own)
        if activation is None:
            names = ["relu" if k == 2 else "tanh" for k in params.activation.tolist()]
            assert names == [metrics[row]["config.activation"] for row in rows]
    assert zoo.spec.layout == (1, 2, 3, 4)
    assert {layer.activation for layer in zoo.spec.layers[:-1]} == {activation or "hetero"}


def test_unknown_activation_of_cnns(tmp_path):
    write_cnns(tmp_path)
    with pytest.raises(ValueError, match=r"data.activation_function: found gelu, expected one of relu, tanh"):
        open_data(
            DataConfig(str(tmp_path), "svhn", activation_function="gelu", idcs_file=f"{tmp_path}/cifar10_split.csv")
        )


@pytest.mark.parametrize("activations", [("relu", "tanh"), pytest.param(("tanh",), marks=pytest.mark.slow)])
def test_cnn_zoo_of_ours_in_the_published_layout(tmp_path, activations):
    """Written by the command, read back identically: the final networks, to the bit, each with its accuracy."""
    recipe = {"networks": 30, "checkpoints": (0, 1, 3), "channels": (3, 4), "padding": "same", "num_images": 100}
    ours = open_zoo(make_cnn_zoo(CnnRecipe(out=str(tmp_path / "zoo"), activations=activations, **recipe)))
    command = ["-m", "scalegmn", "zoo", "published", ours.path, "--out", tmp_path / "published"]
    result = run_here(*command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    names = ["cifar10_split.csv", "layout.csv", "metrics.csv.gz", "weights.npy"]
    assert sorted(path.name for path in (tmp_path / "published").iterdir()) == names
    zoo, splits = load_splits(DataConfig(str(tmp_path / "published"), "cifar10"), "test_accuracy")
    assert {name: len(nets) for name, nets in splits.items()} == {"train": 12, "val": 3, "test": 15}
    assert zoo.spec == ours.spec
    rows = zoo.columns["row"]
    assert sorted(rows.tolist()) == (ours.columns["epoch"] == 3).nonzero()[:, 0].tolist()
    assert torch.equal(zoo.params.flatten(), ours.params[rows].flatten())
    assert torch.equal(zoo.columns["test_accuracy"], ours.columns["test_accuracy"][rows])
    if len(activations) > 1:
        assert torch.equal(zoo.params.activation, ours.params.activation[rows])
    again = run_here(*command, cwd=tmp_path)
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "exists already" in again.stderr


def test_other_zoos_have_no_published_layout(tmp_path, random_params):
    params = random_params(NetSpec.mlp([2, 4, 1], "sine"), 9).to(torch.float32)
    splits = {name: torch.tensor([k]) for k, name in enumerate(("train", "val", "test"))}
    write_zoo(tmp_path / "zoo", [Networks((params,), {"label": torch.zeros(9).long()})], splits, {})
    with pytest.raises(ValueError, match=r"found MLP .* with columns label, expected convolutions and one linear"):
        write_published(open_zoo(tmp_path / "zoo"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_where_conversions_go(tmp_path, generator, monkeypatch, capsys):
    folder = tmp_path / "with space"
    write_mnist(folder, generator)
    config = DataConfig(str(folder / "mnist-inrs"), "labeled_mnist_inr", str(folder / "mnist_splits.json"))
    inside = open_data(config)
    assert inside.path.parent == folder / "mnist-inrs"
    monkeypatch.chdir(folder)
    relative = replace(config, dataset_path="mnist-inrs", split_path="mnist_splits.json")
    capsys.readouterr()
    assert open_data(relative).path.resolve() == inside.path
    assert capsys.readouterr().out == ""  # not converted again
    assert open_data(replace(config, cache_dir=str(tmp_path / "cache"))).path.parent == tmp_path / "cache"
    shutil.rmtree(inside.path)
    with monkeypatch.context() as patch:  # root may write anywhere, so the folder only claims to be read-only
        patch.setattr(convert, "_writable", lambda path: path != folder / "mnist-inrs")
        elsewhere = open_data(config)
    assert elsewhere.path.is_relative_to(tmp_path / "user cache")
    assert elsewhere.sha256 == inside.sha256
    capsys.readouterr()
    assert open_data(config).path == elsewhere.path
    assert capsys.readouterr().out == ""


def test_changed_files_are_converted_again(tmp_path, generator, capsys):
    write_mnist(tmp_path, generator)
    config = DataConfig(str(tmp_path / "mnist-inrs"), "labeled_mnist_inr", str(tmp_path / "mnist_splits.json"))
    before = open_data(config)
    state = siren(generator)
    save(state, tmp_path / "mnist-inrs/mnist_png_training_5_0/checkpoints/model_final.pth")
    after = open_data(config)
    assert "has changed since" in capsys.readouterr().out
    assert after.sha256 != before.sha256
    row = after.splits["train"][5]
    assert torch.equal(after.params.biases[0][row], state["seq.0.bias"])
    capsys.readouterr()
    shutil.rmtree(tmp_path / "mnist-inrs/mnist_png_training_5_0")
    with pytest.raises(ValueError, match="no such network"):
        open_data(config)
    for folder in (tmp_path / "mnist-inrs").glob("mnist_png_*"):  # all originals may go once they are converted
        shutil.rmtree(folder)
    assert open_data(config).sha256 == after.sha256
    assert "are gone; reading it as it is" in capsys.readouterr().out


def test_a_download_that_grows_is_converted_again(tmp_path, generator, monkeypatch):
    monkeypatch.setattr(convert, "SAMPLE", 2)
    write_cifar(tmp_path / "whole", generator)
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "randinit_smaller_2s")
    config = DataConfig(str(tmp_path / "part"), "cifar_inr", extra_aug=2)
    before = open_data(config)
    shutil.copytree(tmp_path / "whole" / "randinit_smaller_2s", tmp_path / "part" / "randinit_smaller_2s")
    after = open_data(config)
    assert (len(before), len(after)) == (14, 16)


def test_one_cache_for_two_datasets(tmp_path, generator):
    for name in ("first", "second"):
        write_cifar(tmp_path / name, generator, augs=0)
    configs = [
        DataConfig(str(tmp_path / name), "cifar_inr", cache_dir=str(tmp_path / "c")) for name in ("first", "second")
    ]
    zoos = [open_data(config) for config in configs]
    assert not torch.equal(zoos[0].params.flatten(), zoos[1].params.flatten())
    assert [open_data(config).sha256 for config in configs] == [zoo.sha256 for zoo in zoos]
    with pytest.raises(ValueError, match="no such folder"):
        open_data(replace(configs[0], dataset_path=str(tmp_path / "nothing")))


def test_other_splits_are_another_zoo(tmp_path, generator):
    write_mnist(tmp_path, generator)
    file = tmp_path / "mnist_splits.json"
    config = DataConfig(str(tmp_path / "mnist-inrs"), "labeled_mnist_inr", str(file))
    first = open_data(config)
    splits = json.loads(file.read_text())
    for key in ("path", "label"):
        splits["val"][key].append(splits["train"][key].pop())
    file.write_text(json.dumps(splits))
    second = open_data(config)
    assert (len(first.splits["val"]), len(second.splits["val"])) == (2, 3)


def test_splits_of_windows(tmp_path, generator):
    """With a byte-order mark, in UTF-8 and in UTF-16: the same splits."""
    write_fmnist(tmp_path / "fmnist", generator)
    splits = tmp_path / "fmnist" / "splits.json"
    text, found = splits.read_text(), []
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        splits.write_text(text, encoding=encoding)
        zoo, _ = load_splits(DataConfig(str(tmp_path / "fmnist"), "labeled_fashion_mnist_inr"), "label")
        found.append({name: zoo.columns["label"][rows].tolist() for name, rows in zoo.splits.items()})
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(("path", "reason"), [("", "Is a directory"), ("a\0b/c.pth", "null byte")])
def test_splits_that_name_no_files(tmp_path, generator, path, reason):
    write_fmnist(tmp_path, generator)
    splits = json.loads((tmp_path / "splits.json").read_text())
    (tmp_path / "splits.json").write_text(json.dumps({**splits, "val": {"path": [path]}}))
    with pytest.raises(ValueError, match=rf"^'.*is no file that can be read \(.*{reason}.*\); leave it out of the spl"):
        open_data(DataConfig(str(tmp_path), "labeled_fashion_mnist_inr"))


def test_class_names_of_published_datasets(tmp_path, generator):
    write_fmnist(tmp_path / "fmnist", generator)
    write_cifar(tmp_path / "cifar", generator)
    write_mnist(tmp_path, generator)
    names = open_data(DataConfig(str(tmp_path / "fmnist"), "labeled_fashion_mnist_inr")).classes
    assert (names[0], names[9], len(names)) == ("T-shirt/top", "Ankle boot", 10)
    assert open_data(DataConfig(str(tmp_path / "cifar"), "cifar_inr")).classes[3] == "cat"
    splits = str(tmp_path / "mnist_splits.json")
    assert open_data(DataConfig(str(tmp_path / "mnist-inrs"), "labeled_mnist_inr", splits)).classes is None


def test_labels_beyond_nine(tmp_path, generator):
    """Three datasets of more classes: the names of Fashion-MNIST's and CIFAR-10's are not theirs."""
    write_mnist(tmp_path, generator)
    root = tmp_path / "mnist-inrs"
    (root / "mnist_png_training_9_4").rename(root / "mnist_png_training_25_4")
    mnist_splits_of_root = mnist_splits(root, val_size=2)
    (root / "mnist_splits.json").write_text(json.dumps(mnist_splits_of_root))
    zoo = open_data(DataConfig(str(root), "labeled_mnist_inr"))
    assert zoo.columns["label"][zoo.columns["image"] == 4].tolist() == [25]

    write_fmnist(tmp_path / "fmnist", generator)
    path = tmp_path / "fmnist/test/model_5.pth"
    save({**torch.load(path, weights_only=True), "label": 12}, path)
    zoo = open_data(DataConfig(str(tmp_path / "fmnist"), "labeled_fashion_mnist_inr"))
    assert (zoo.columns["label"].max(), zoo.classes) == (12, None)
    save({**torch.load(path, weights_only=True), "label": -1}, path)
    with pytest.raises(ValueError, match=r"model_5.pth: label: found -1, expected the number of a class, 0 to 999999"):
        open_data(DataConfig(str(tmp_path / "fmnist"), "labeled_fashion_mnist_inr"))

    write_cifar(tmp_path / "cifar", generator)
    (tmp_path / "cifar/randinit_smaller_2s").rename(tmp_path / "cifar/randinit_smaller_11s")
    zoo = open_data(DataConfig(str(tmp_path / "cifar"), "cifar_inr"))
    assert (sorted({*zoo.columns["label"].tolist()}), zoo.classes) == ([0, 1, 3, 4, 5, 6, 11], None)


def test_labels_may_be_names(tmp_path, generator):
    """In natural order, and kept."""
    for k, name in enumerate(["a10", "a9", "b", "a9", "a10", "b"]):
        save(
            siren(generator),
            tmp_path / f"mnist_png_{'testing' if k > 3 else 'training'}_{name}_{k}/checkpoints/model_final.pth",
        )
    (tmp_path / "mnist_splits.json").write_text(json.dumps(mnist_splits(tmp_path, val_size=1)))
    zoo = open_data(DataConfig(str(tmp_path), "labeled_mnist_inr"))
    by_image = dict(zip(zoo.columns["image"].tolist(), zoo.columns["label"].tolist(), strict=True))
    assert zoo.classes == ("a9", "a10", "b")
    assert by_image == {0: 1, 1: 0, 2: 2, 3: 0, 60_004: 1, 60_005: 2}


WORDS = {
    "of the images": (["Sandal", "Coat", "Ankle boot", "Coat"], [5, 4, 9, 4], 10),
    "of others": (["b10", "b9", "a", "b9"], [2, 1, 0, 1], 3),
}


@pytest.mark.parametrize("kind", WORDS)
def test_labels_in_files_may_be_names(tmp_path, generator, kind):
    """Those of Fashion-MNIST have its numbers, others their natural order; names and numbers are not mixed."""
    words, numbers, num_classes = WORDS[kind]
    states = write_fmnist(tmp_path, generator)
    for k, (split, n) in enumerate(states):
        save({**states[split, n], "label": words[k % 4]}, tmp_path / split / f"model_{n}.pth")
    config = DataConfig(str(tmp_path), "labeled_fashion_mnist_inr")
    zoo, splits = load_splits(config, "label")
    assert torch.cat([splits[name].labels for name in ("train", "val", "test")]).tolist() == (numbers * 3)[:9]
    assert len(zoo.classes) == num_classes
    assert {zoo.classes[number] for number in numbers} == {*words}

    save({**states["test", 5], "label": 3}, tmp_path / "test/model_5.pth")
    expected = r"test/model_5.pth: label: found 3, expected the name of a class, as in .*train/model_10.pth"
    with pytest.raises(ValueError, match=expected):
        open_data(replace(config, cache_dir=str(tmp_path / "other")))
    assert not list((tmp_path / "other").iterdir())


def test_frequencies_and_offset_of_sirens(tmp_path, generator):
    write_cifar(tmp_path, generator)
    plain = DataConfig(str(tmp_path), "cifar_inr", switch_to_canon=False)
    given = {"w0": 20, "first_w0": 15.0, "output_offset": 0.0}
    zoo, other = open_data(plain), open_data(replace(plain, dataset_args=given))
    assert [layer.w0 for layer in other.spec.layers[:2]] == [15.0, 20.0]
    assert [layer.w0 for layer in zoo.spec.layers[:2]] == [30.0, 30.0]
    assert zoo.spec.layers[-1].w0 == other.spec.layers[-1].w0 == 1  # no sine
    assert other.provenance["output_offset"] == 0
    assert all(map(torch.equal, zoo.params.tensors(), other.params.tensors()))
    defaults = {"w0": 30, "first_w0": None, "output_offset": 0.5}
    assert open_data(replace(plain, dataset_args=defaults)).path == zoo.path


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"w1": 3}, "data.dataset_args: found w1, expected some of w0, first_w0, output_offset"),
        ({"w0": "high"}, "data.dataset_args.w0: found 'high', expected a number"),
        ({"w0": None}, "data.dataset_args.w0: found None, expected a number"),
        ({"first_w0": 0}, "data.dataset_args.first_w0: found 0, expected above 0"),
    ],
)
def test_wrong_options_of_sirens_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(dataset="cifar_inr", dataset_args=given)
