import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scalegmn.models.statnn import StatNNConfig
from scalegmn.networks import NetParams, NetSpec
from scalegmn.networks.evaluate import evaluate
from scalegmn.symmetry.canonicalize import canonicalize_phase
from scalegmn.tasks.classification import Classification
from scalegmn.zoos.augment import AugmentConfig
from scalegmn.zoos.loader import DataConfig, LabelledNets, UnreadSetting, augmented, load_splits, open_data
from scalegmn.zoos.zoo_format import Networks, open_zoo, write_zoo


@pytest.fixture
def config(tmp_path, random_params):
    params = random_params(NetSpec.mlp([2, 4, 3, 1], "sine", 5.0), 20)
    splits = {"train": torch.arange(3, 20), "val": torch.tensor([0, 1]), "test": torch.tensor([2])}
    write_zoo(tmp_path / "zoo", [Networks((params,), {"label": torch.arange(20) % 10})], splits, {})
    return DataConfig(str(tmp_path / "zoo"))


def test_the_numbers_that_reach_the_model(config):
    stored = open_zoo(Path(config.dataset_path)).params
    for canonical in (True, False):
        _, splits = load_splits(replace(config, switch_to_canon=canonical), "label")
        expected = canonicalize_phase(stored) if canonical else stored
        assert torch.equal(splits["train"].read(slice(None)).weights[1], expected.weights[1][3:])
        assert torch.equal(splits["train"].read(slice(None)).biases[0], expected.biases[0][3:])
        assert splits["train"].labels.tolist() == [k % 10 for k in range(3, 20)]
        largest = (5.0 * splits["train"].read(slice(None)).biases[0]).abs().max().item()
        assert (largest <= math.pi / 2 + 1e-9) == canonical


def test_canonical_forms_that_networks_lack_are_refused_at_once(tmp_path, random_params):
    params = random_params(NetSpec.mlp([2, 4, 3], "hetero"), 4, [0, 1, 0, 1])
    splits = {"train": torch.tensor([0, 1]), "val": torch.tensor([2]), "test": torch.tensor([3])}
    write_zoo(tmp_path / "zoo", [Networks((params,), {"label": torch.arange(4)})], splits, {})
    config = DataConfig(str(tmp_path / "zoo"), canonicalize=("even_scale",))
    with pytest.raises(ValueError, match=r"data.canonicalize: even_scale: found .*; use scale"):
        load_splits(config, "label")


def test_networks_along_their_orbit(config):
    """They compute the same, from other numbers: permuted, with other signs and phases."""
    _, splits = load_splits(replace(config, switch_to_canon=False), "label")
    stored, moved = (nets.read(slice(None)) for nets in (splits["train"], replace(splits["train"], orbit=0)))
    points = torch.rand(9, 2, dtype=torch.float64)
    torch.testing.assert_close(evaluate(moved, points), evaluate(stored, points), rtol=0, atol=1e-9)
    assert (moved.flatten() != stored.flatten()).any(1).all()
    sizes, other_sizes = (params.biases[0].abs().sort(1).values for params in (stored, moved))
    assert ((sizes - other_sizes).abs() > 0.1).any(1).all()  # no permutation or sign does that
    sizes, other_sizes = (canonicalize_phase(params).biases[0].abs().sort(1).values for params in (stored, moved))
    torch.testing.assert_close(sizes, other_sizes, rtol=0, atol=1e-9)


def test_some_training_networks(config):
    """The same ones always, more of them for a larger number; the other splits stay."""
    chosen = []
    for number in (4, 9, 17):
        zoo, splits = load_splits(replace(config, train_networks=number), "label")
        chosen.append({*splits["train"].rows.tolist()})
        assert splits["train"].labels.tolist() == zoo.columns["label"][splits["train"].rows].tolist()
        assert (len(chosen[-1]), len(splits["val"]), len(splits["test"])) == (number, 2, 1)
    assert chosen[0] < chosen[1] < chosen[2] == set(range(3, 20))
    with pytest.raises(ValueError, match=r"data.train_networks: found 18, expected at most 17, as in"):
        load_splits(replace(config, train_networks=18), "label")
    with pytest.raises(ValueError, match=r"data.train_networks: found 0, expected at least 1"):
        replace(config, train_networks=0)


def test_batches_cover_the_split_once(config):
    _, splits = load_splits(config, "label")
    train = splits["train"]
    everything = train.read(slice(None))
    batches = list(train.batches(5))
    assert [len(labels) for _, labels in batches] == [5, 5, 5, 2]
    assert torch.equal(torch.cat([params.biases[0] for params, _ in batches]), everything.biases[0])
    rows = torch.randperm(17, generator=torch.Generator().manual_seed(0)).split(5)
    shuffled = list(train.batches(rows))
    assert [len(labels) for _, labels in shuffled] == [5, 5, 5, 2]
    assert torch.equal(torch.cat([params.biases[2] for params, _ in shuffled]), everything.biases[2][torch.cat(rows)])
    assert list(train.batches([])) == []
    for params, labels in shuffled:  # labels stay with their networks
        for bias, label in zip(params.biases[2][:, 0], labels, strict=True):
            assert train.labels[(everything.biases[2][:, 0] == bias)].item() == label


def test_limit(config):
    _, splits = load_splits(config, "label", limit=2)
    assert [len(nets) for nets in splits.values()] == [2, 2, 1]
    assert isinstance(splits["val"], LabelledNets)


def test_missing_column_and_split(config, tmp_path, random_params):
    with pytest.raises(ValueError, match="no column 'accuracy', found label"):
        load_splits(config, "accuracy")
    write_zoo(
        tmp_path / "tiny",
        [Networks((random_params(NetSpec.mlp([2, 2, 1], "sine"), 2),), {"label": torch.zeros(2)})],
        {"train": torch.arange(2), "val": torch.arange(0), "test": torch.arange(0)},
        {},
    )
    with pytest.raises(ValueError, match="no networks in split val, test"):
        load_splits(DataConfig(str(tmp_path / "tiny")), "label")


UNREAD = [
    ("zoo", {"split_path": "s.json"}, "data.split_path: found s.json, but data.dataset zoo does not read it"),
    ("cifar_inr", {"split_path": "s.json"}, "data.split_path: found s.json, but data.dataset cifar_inr does not"),
    ("cifar10", {"extra_aug": 1, "data_path": "w.npy"}, "data.extra_aug: found 1, but data.dataset cifar10 does not"),
    ("labeled_mnist_inr", {"split_points": (3, 4)}, "data.split_points: found (3, 4), but data.dataset labeled_mnist"),
]


def test_a_zoo_in_place_of_published_files(config):
    """With the published configuration, which names the files of the layout."""
    files = {"data_path": "w.npy", "metrics_path": "m.csv.gz", "layout_path": "l.csv", "idcs_file": "s.csv"}
    assert len(open_data(DataConfig(config.dataset_path, "cifar10", **files))) == 20
    for dataset, name, value in (("labeled_mnist_inr", "split_path", "s.json"), ("cifar_inr", "extra_aug", 20)):
        expected = f"data.{name}: found {value}, but the zoo {config.dataset_path} does not read it; leave it out"
        with pytest.warns(UnreadSetting, match=re.escape(expected)):
            assert len(open_data(DataConfig(config.dataset_path, dataset, **{name: value}))) == 20


@pytest.mark.parametrize(("dataset", "settings", "message"), UNREAD)
def test_settings_that_a_dataset_has_no_use_for(config, dataset, settings, message):
    path = config.dataset_path
    assert len(open_data(DataConfig(path, dataset))) == 20
    with pytest.raises(ValueError, match=re.escape(message.format(path))) as caught:
        open_data(DataConfig(path, dataset, **settings))
    assert "\n" not in str(caught.value)
    assert re.search(r"leave it out \(--data\.\w+ \S", str(caught.value))


@pytest.fixture
def mixed(tmp_path, random_params):
    """Thirty networks of three architectures, numbered by the bias of their one output, as `label` says; all splits
    mix all architectures."""
    layouts, nets = ([2, 4, 1], [2, 3, 3, 1], [2, 5, 1]), []
    for first, layout in zip((0, 12, 13), (*layouts, None), strict=False):
        params = random_params(NetSpec.mlp(layout, "sine", 5.0), {0: 12, 12: 1, 13: 17}[first])
        number = first + torch.arange(len(params)).double()[:, None]
        nets.append(NetParams(params.spec, params.weights, (*params.biases[:-1], number)))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    splits = dict(zip(("train", "val", "test"), order.split([20, 5, 5]), strict=True))
    write_zoo(tmp_path / "mixed", [Networks(tuple(nets), {"label": torch.arange(30)})], splits, {})
    return DataConfig(str(tmp_path / "mixed"))


def numbers(params):
    """Of networks of `mixed`."""
    return torch.cat([part.biases[-1][:, 0] for part in params.parts]).long()


def test_labels_stay_with_networks_of_several_architectures(mixed):
    zoo, splits = load_splits(mixed, "label")
    for name, nets in splits.items():
        assert sorted(nets.labels.tolist()) == sorted(zoo.splits[name].tolist())
        assert torch.equal(numbers(nets.read(slice(None))), nets.labels)
        for params, labels in nets.batches(4):
            assert torch.equal(numbers(params), labels)
    task = Classification(mixed, 8, StatNNConfig(out_dim=30))
    generator, seen = torch.Generator().manual_seed(0), []
    epoch = task.shuffle(generator)
    for params, labels in task.train_batches(epoch, generator, torch.device("cpu")):
        assert torch.equal(numbers(params), labels)
        assert len({part.spec for part in params.parts}) == len(params.parts) > 1  # each once
        seen += labels.tolist()
    assert sorted(seen) == sorted(zoo.splits["train"].tolist())
    assert [len(rows) for rows in epoch] == [8, 8, 4]


def test_networks_come_in_the_order_asked_for(mixed):
    zoo, _ = load_splits(mixed)
    rows = torch.tensor([29, 0, 13, 13, 12, 5])
    taken = zoo.take(rows)
    assert [len(part) for part in taken.parts] == [1, 1, 2, 1, 1]
    assert torch.equal(numbers(taken), rows)
    assert isinstance(zoo.take(rows[1:2]), NetParams)
    assert torch.equal(taken.parts[2].weights[0], zoo.nets[2].weights[0][[0, 0]])


def test_canonical_and_augmented_networks_of_several_architectures(mixed):
    _, splits = load_splits(mixed, "label")
    params, labels = next(splits["train"].batches(20))
    largest = max((5.0 * bias).abs().max() for part in params.parts for bias in part.biases[:-1])
    assert largest <= math.pi / 2 + 1e-9
    config = replace(mixed, augment=AugmentConfig(noise=0.01, group=("permutation", "sign")))
    moved, same = augmented(config, params, labels, torch.Generator().manual_seed(0))
    assert torch.equal(same, labels)
    assert torch.equal((numbers(moved) - labels).abs() <= 1, torch.ones(20).bool())
    for part, other in zip(moved.parts, params.parts, strict=True):
        assert part.spec == other.spec
        assert (part.flatten() != other.flatten()).any(1).all()
    with pytest.raises(ValueError, match=r"data.augment.mixup: found 0.5, expected 0 for networks of several"):
        load_splits(replace(mixed, augment=AugmentConfig(mixup=0.5)), "label")
    with pytest.raises(ValueError, match=r"data.augment.group: found scale, expected one of permutation, sign, phase"):
        load_splits(replace(mixed, augment=AugmentConfig(group=("scale",))), "label")


def test_a_few_networks_of_every_architecture(mixed):
    """`limit` takes the first of a split as it is stored, not those of the first architecture."""
    zoo, splits = load_splits(mixed, "label", limit=6)
    assert set(splits["train"].labels.tolist()) == set(zoo.splits["train"][:6].tolist())


def test_one_activation_of_several_architectures(tmp_path, random_params):
    specs = [NetSpec.mlp([2, 4, 1], "hetero"), NetSpec.mlp([2, 3, 1], "tanh"), NetSpec.mlp([2, 3, 3, 1], "relu")]
    nets = [random_params(specs[0], 4, [1, 2, 1, 2]), random_params(specs[1], 3), random_params(specs[2], 3)]
    rows = torch.tensor([9, 4, 0, 1, 2, 3, 5, 7, 6, 8])
    splits = dict(zip(("train", "val", "test"), rows.split([4, 4, 2]), strict=True))
    write_zoo(tmp_path / "zoo", [Networks(tuple(nets), {"label": torch.arange(10)})], splits, {})
    zoo, found = load_splits(DataConfig(str(tmp_path / "zoo"), activation_function="relu"), "label")
    assert [str(params.spec) for params in zoo.nets] == ["MLP [2, 4, 1] (relu)", "MLP [2, 3, 3, 1] (relu)"]
    assert zoo.architectures == {zoo.nets[0].spec: 1, zoo.nets[1].spec: 1}
    with pytest.raises(ValueError, match=r"activation_function: found elu, expected one of relu, tanh as in .*zoo"):
        load_splits(DataConfig(str(tmp_path / "zoo"), activation_function="elu"), "label")
    assert {name: own.labels.tolist() for name, own in found.items()} == {"train": [1, 9], "val": [3, 7], "test": [8]}
