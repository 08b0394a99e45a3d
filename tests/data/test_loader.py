import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scalegmn.data.loader import DataConfig, LabelledNets, load_splits
from scalegmn.data.zoo_format import Networks, open_zoo, write_zoo
from scalegmn.spec import NetSpec
from scalegmn.symmetry.canonicalize import canonicalize_phase


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
