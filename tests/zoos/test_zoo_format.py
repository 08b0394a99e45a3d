import json

import pytest
import torch
from architectures import traced
from safetensors import safe_open

from scalegmn.networks import LayerSpec, NetSpec
from scalegmn.zoos import zoo_format
from scalegmn.zoos.zoo_format import Networks, _description_sha256, open_zoo, split_by_group, verify_zoo, write_zoo


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
    with pytest.raises(ValueError, match=r"no zoo there \(zoo.json and .* missing.*that `scalegmn zoo inr`"):
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
    with pytest.raises(ValueError, match=r"zoo.json: not the description of a zoo .*checksum differs"):
        open_zoo(zoo[0])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"version": 2', '"version": 99', "format version 99, expected 2"),
        ('"specs"', '"species"', "not the description of a zoo .*'specs'"),
        ('"chunks_sha256"', '"chunks"', "not the description of a zoo .*'chunks_sha256'"),
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
    with pytest.raises(ValueError, match=r"not the description of a zoo.*make it again"):
        open_zoo(zoo[0])


@pytest.fixture
def mixed(tmp_path, random_params):
    """Networks 0 to 4 of one architecture and 5 to 7 of another, from three parts; one with a residual connection."""
    first, second, last = NetSpec.mlp([2, 4, 4, 1], "sine").layers
    sirens = random_params(NetSpec((first, second, LayerSpec(4, 4, None, "sine", 30.0, residual=0), last)), 5)
    cnns = random_params(NetSpec((LayerSpec(1, 3, (3, 3), "relu"), LayerSpec(3, 2))), 3).to(torch.float16)
    label = torch.arange(8)
    parts = [
        Networks((sirens[:2],), {"label": label[:2]}),
        Networks((cnns[:1], sirens[2:4]), {"label": label[[5, 2, 3]]}),
        Networks((sirens[4:], cnns[1:]), {"label": label[[4, 6, 7]]}),
    ]
    write_zoo(tmp_path / "mixed", parts, {"train": torch.tensor([7, 0]), "test": torch.tensor([2, 3])}, {})
    return tmp_path / "mixed", sirens, cnns


def test_several_architectures(mixed):
    path, *expected = mixed
    zoo = verify_zoo(path)
    assert [params.spec for params in zoo.nets] == [params.spec for params in expected]
    for found, own in zip(zoo.nets, expected, strict=True):
        assert torch.equal(found.flatten(), own.flatten())
        assert found.biases[0].dtype == own.biases[0].dtype
    assert zoo.columns["label"].tolist() == list(range(8))
    assert zoo.splits["train"].tolist() == [7, 0]
    assert zoo.splits["test"].tolist() == [5, 2]  # the networks that the parts have at 2 and 3
    assert len(zoo) == 8
    with pytest.raises(ValueError, match=r"expected networks of one architecture, found 2: MLP .*CNN"):
        zoo.spec  # noqa: B018


def test_safetensors_reads_the_file(mixed):
    with safe_open(mixed[0] / "zoo.safetensors", "np") as file:
        assert set(file.keys()) >= {"spec0.weight.0", "spec1.bias.1", "column.label", "split.test"}
        assert file.get_tensor("spec1.weight.0").shape == (3, 3, 1, 3, 3)


def test_parts_must_agree(tmp_path, random_params):
    params = random_params(NetSpec.mlp([2, 4, 1], "sine"), 4)
    parts = [Networks((params,), {}), Networks((params.to(torch.float32),), {})]
    with pytest.raises(ValueError, match=r"spec0.weight.0: found torch.float32 .* in an earlier part .*float64"):
        write_zoo(tmp_path / "zoo", parts, {}, {})
    parts = [Networks((params,), {"label": torch.zeros(4)}), Networks((params,), {})]
    with pytest.raises(ValueError, match=r"column.label: 4 rows for 8 networks"):
        write_zoo(tmp_path / "zoo", parts, {}, {})
    with pytest.raises(ValueError, match=r"column.label: found torch.bool"):
        write_zoo(tmp_path / "zoo", [Networks((params,), {"label": torch.zeros(4).bool()})], {}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "message"), [([4], "found network 4, expected 0 to 3"), ([1, 1], "network 1 is named 2 times")]
)
def test_splits_must_be_disjoint_sets(tmp_path, random_params, rows, message):
    params = random_params(NetSpec.mlp([2, 4, 1], "sine"), 4)
    with pytest.raises(ValueError, match=message):
        write_zoo(tmp_path / "zoo", [Networks((params,), {})], {"train": torch.tensor(rows)}, {})
    assert list(tmp_path.iterdir()) == []


def test_large_zoos_are_sampled_on_opening_and_verified_in_full(monkeypatch, random_params, tmp_path):
    monkeypatch.setattr(zoo_format, "CHUNK", 64)
    params = random_params(NetSpec.mlp([2, 40, 1], "sine"), 6)
    write_zoo(tmp_path / "large", [Networks((params,), {})], {}, {})
    file = tmp_path / "large" / "zoo.safetensors"
    good = file.read_bytes()
    found = []
    header = 8 + int.from_bytes(good[:8], "little")
    for at in (*range(header, len(good), 64), len(good) - 1):
        file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(ValueError, match="make it again"):
            verify_zoo(tmp_path / "large")
        try:
            open_zoo(tmp_path / "large")
        except ValueError:
            found.append(at // 64)
    last = (len(good) - 1) // 64
    assert last in found
    assert 5 <= len(found) <= zoo_format.CHUNKS_ON_OPENING + 1


def test_not_finite(tmp_path, random_params):
    params = random_params(NetSpec.mlp([2, 4, 1], "sine"), 4)
    params.weights[1][2, 0, 1] = torch.nan
    write_zoo(tmp_path / "zoo", [Networks((params,), {})], {}, {})
    with pytest.raises(ValueError, match=r"network 2 has NaN or infinite weights"):
        verify_zoo(tmp_path / "zoo")


def test_failure_leaves_nothing(tmp_path, random_params):
    def full(folder):
        raise OSError(28, "No space left on device")

    parts = [Networks((random_params(NetSpec.mlp([2, 4, 1], "sine"), 4),), {})]
    with pytest.raises(OSError, match=r"zoo.writing cannot be written \(No space left on device\); free space"):
        write_zoo(tmp_path / "zoo", parts, {}, {}, full)
    assert list(tmp_path.iterdir()) == []


def test_split_by_group():
    groups = torch.arange(50).repeat_interleave(3)
    splits = split_by_group(groups, {"val": 0.1, "test": 0.2}, seed=0)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 105, "val": 15, "test": 30}
    found = [set(groups[rows].tolist()) for rows in splits.values()]
    assert not found[0] & found[1]
    assert not found[0] & found[2]
    assert not found[1] & found[2]


def test_batch_norms_are_to_be_folded_first(tmp_path):
    """Zoos have no place for statistics; the folded networks are stored."""
    _, params, _ = traced("mobile")
    splits = {"train": torch.arange(1)}
    with pytest.raises(
        ValueError, match=r"statistics of batch norms, found network of .*; store params.with_batch_norm_folded\(\)$"
    ):
        write_zoo(tmp_path / "zoo", [Networks((params,), {})], splits, {})
    assert not list(tmp_path.iterdir())
    write_zoo(tmp_path / "zoo", [Networks((params.with_batch_norm_folded(),), {})], splits, {})
    stored = open_zoo(tmp_path / "zoo").params
    assert stored.spec == params.with_batch_norm_folded().spec
    assert torch.equal(stored.flatten(), params.with_batch_norm_folded().flatten())
