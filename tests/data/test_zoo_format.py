import json

import pytest
import torch

from scalegmn.data.zoo_format import Networks, _description_sha256, open_zoo, split_by_group, write_zoo
from scalegmn.spec import NetSpec


@pytest.fixture
def zoo(tmp_path, random_params):
    params = random_params(NetSpec.mlp([2, 4, 1], "hetero"), 6, [0, 1, 2, 0, 1, 2])
    splits = {"train": torch.arange(4), "val": torch.tensor([4]), "test": torch.tensor([5])}
    write_zoo(tmp_path / "zoo", [Networks((params,), {"label": torch.arange(6)})], splits, {"recipe": {"seed": 1}})
    return tmp_path / "zoo", params


def test_round_trip(zoo):
    path, params = zoo
    found = open_zoo(path)
    assert found.spec == params.spec
    for a, b in zip((*found.params.weights, *found.params.biases), (*params.weights, *params.biases), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(found.params.activation, params.activation)
    assert found.columns["label"].tolist() == list(range(6))
    assert found.splits["test"].tolist() == [5]
    assert found.provenance == {"recipe": {"seed": 1}}


def test_never_overwritten(zoo):
    path, params = zoo
    with pytest.raises(ValueError, match="exists already"):
        write_zoo(path, [Networks((params,), {})], {}, {})


def test_missing(tmp_path, zoo):
    with pytest.raises(
        ValueError, match=r"no zoo there \(zoo.json and .* missing.*dataset_path.*python -m scalegmn.zoos"
    ):
        open_zoo(tmp_path / "nothing")
    (zoo[0] / "zoo.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no zoo there \(zoo.safetensors missing\)"):
        open_zoo(zoo[0])


def test_truncated(zoo):
    file = zoo[0] / "zoo.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"zoo.safetensors: \d+ bytes, expected \d+: truncated"):
        open_zoo(zoo[0])


def test_edited(zoo):
    file = zoo[0] / "zoo.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="checksum differs"):
        open_zoo(zoo[0])


def rewrite(folder, old, new, seal=False):
    """Replaces text in zoo.json; `seal`: with the checksum that belongs to the new text."""
    file = folder / "zoo.json"
    content = json.loads(json.dumps(json.loads(file.read_text())).replace(old, new))
    if seal:
        content["sha256"] = _description_sha256(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("old", "new"), [('"w0": 30.0', '"w0": 6.0'), ('"hetero"', '"relu"'), ('"seed": 1', '"seed": 2')]
)
def test_edited_description(zoo, old, new):
    rewrite(zoo[0], old, new)
    with pytest.raises(ValueError, match=r"zoo.json: not a zoo description .*checksum differs"):
        open_zoo(zoo[0])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"version": 2', '"version": 99', "format version 99, expected 2"),
        ('"specs"', '"species"', "not a zoo description .*'specs'"),
        ('"chunks_sha256"', '"chunks"', "not a zoo description .*'chunks_sha256'"),
        ('"out_dim": 4', '"out_dim": 3', "reads 4 neurons"),
        ('_dim": 4', '_dim": 3', "layer 0: weight"),
        ('["label"]', '["label", "image"]', "not the tensors that zoo.json describes .*column.image"),
    ],
)
def test_wrong_description(zoo, old, new, message):
    rewrite(zoo[0], old, new, seal=True)
    with pytest.raises(ValueError, match=message):
        open_zoo(zoo[0])


def test_description_that_is_not_json(zoo):
    (zoo[0] / "zoo.json").write_text("{")
    with pytest.raises(ValueError, match=r"not a zoo description.*make it again"):
        open_zoo(zoo[0])


def test_split_by_group():
    groups = torch.arange(50).repeat_interleave(3)
    splits = split_by_group(groups, {"val": 0.1, "test": 0.2}, seed=0)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 105, "val": 15, "test": 30}
    found = [set(groups[rows].tolist()) for rows in splits.values()]
    assert not found[0] & found[1]
    assert not found[0] & found[2]
    assert not found[1] & found[2]
