"""`scalegmn zoo canonicalize`: which numbers reach the model."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from scalegmn.cli import main
from scalegmn.experiments import canonical_zoo
from scalegmn.models import ScaleGMNConfig
from scalegmn.networks import BUILT_IN, LayerSpec, NetSpec
from scalegmn.tasks.classification import Classification
from scalegmn.zoos.loader import DataConfig, load_splits
from scalegmn.zoos.zoo_format import Networks, open_zoo, write_zoo

ROOT = Path(__file__).parents[2]
CONF = str(ROOT / "configs/mnist_cls/scalegmn.yml")
SPLITS = {"train": torch.arange(3, 20), "val": torch.tensor([0, 1]), "test": torch.tensor([2])}


def make(path, params, provenance):
    write_zoo(path, [Networks((params.to(torch.float32),), {"label": torch.arange(20) % 10})], SPLITS, provenance)
    return path


@pytest.fixture
def zoo(tmp_path, random_params):
    params = random_params(NetSpec.mlp([2, 4, 3, 1], "sine", 30.0), 20)
    params.biases[0][5:], params.biases[1][5:] = 0.01, -0.01  # these are canonical as they are
    return make(tmp_path / "zoo", params, {"recipe": {"seed": 1}, "images": "noise"})


@pytest.fixture
def command(monkeypatch, capsys):
    """command(path, words): exit code, stdout, stderr."""

    def run(path, *words):
        start = ["scalegmn", "zoo", "canonicalize", "--conf", CONF, "--data.dataset_path", str(path)]
        monkeypatch.setattr(sys, "argv", [*start, *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run


def same(a, b):
    return all(map(torch.equal, (*a.weights, *a.biases), (*b.weights, *b.biases)))


def read(path, **options):
    nets = load_splits(DataConfig(str(path), **options), "label")[1]["train"]
    return nets.read(slice(None))


def test_copy_equals_the_zoo_read_as_canonical(zoo, command, tmp_path):
    copy = tmp_path / "zoo_canon"
    code, out, _ = command(zoo)
    assert (code, out) == (0, f"{copy}: canonical (phase) copy of {zoo}, 5 of 20 networks changed\n")
    stored = read(zoo, switch_to_canon=False)
    on_the_fly = read(zoo)
    assert not same(stored, on_the_fly)
    assert torch.equal(open_zoo(zoo).columns["label"], open_zoo(copy).columns["label"])
    for options in ({}, {"switch_to_canon": False}, {"canonicalize": ()}):
        assert same(read(copy, **options), on_the_fly)
        assert (30.0 * read(copy, **options).biases[0]).abs().max() <= math.pi / 2 + 1e-5
    source, found = open_zoo(zoo), open_zoo(copy)
    assert found.provenance["canonical"] == ["phase"]
    assert found.provenance["source"] == {"path": str(zoo), "sha256": source.sha256, "provenance": source.provenance}
    assert found.provenance["images"] == "noise"
    assert found.provenance["recipe"] == {"canonical_copy_of": source.sha256, "without": ["phase"]}
    assert {name: rows.tolist() for name, rows in found.splits.items()} == {n: r.tolist() for n, r in SPLITS.items()}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["zoo", "zoo_canon"]


def test_blocks_do_not_show(zoo, command, tmp_path, monkeypatch):
    command(zoo)
    monkeypatch.setattr(canonical_zoo, "BLOCK", 7)
    assert command(zoo, "--out", tmp_path / "blocks")[0] == 0
    assert same(open_zoo(tmp_path / "blocks").params, open_zoo(tmp_path / "zoo_canon").params)


def test_scale_of_mixed_cnns(command, tmp_path, random_params, monkeypatch):
    monkeypatch.setattr(canonical_zoo, "BLOCK", 7)
    layers = (LayerSpec(1, 4, (3, 3), "hetero"), LayerSpec(4, 5, (5, 1), "hetero"), LayerSpec(5, 2))
    params = random_params(NetSpec(layers), 20, [BUILT_IN.index(name) for name in ("relu", "tanh")] * 10)
    zoo = make(tmp_path / "cnns", params, {})
    code, out, _ = command(zoo, "--data.canonicalize", "[phase, scale]")
    assert (code, out.rpartition(", ")[2]) == (0, "10 of 20 networks changed\n")
    on_the_fly = read(zoo, canonicalize=("phase", "scale"))
    assert same(read(tmp_path / "cnns_canon", canonicalize=("phase", "scale")), on_the_fly)
    assert torch.equal(open_zoo(tmp_path / "cnns_canon").params.activation, params.activation)


def test_what_a_run_says_it_reads(zoo, command, tmp_path, capsys):
    command(zoo)
    for path, options, expected in (
        (zoo, {}, "canonical (phase)"),
        (tmp_path / "zoo_canon", {}, "canonical (phase)"),
        (tmp_path / "zoo_canon", {"canonicalize": ("phase", "scale")}, "canonical (phase)"),  # sines have no scale
        (zoo, {"canonicalize": ("scale",)}, "as stored"),
        (zoo, {"switch_to_canon": False}, "as stored"),
        (tmp_path / "zoo_canon", {"switch_to_canon": False}, "as stored (canonical: phase)"),
    ):
        task = Classification(DataConfig(str(path), **options), 4, ScaleGMNConfig())
        assert capsys.readouterr().out.endswith(f", {expected}\n")
        found = task.identity()
        assert (found["read"], found["zoo"], found["sha256"]) == (expected, str(path), open_zoo(path).sha256)


def test_the_same_copy_again(zoo, command, tmp_path):
    copy = tmp_path / "zoo_canon"
    command(zoo)
    content = (copy / "zoo.json").read_text()
    code, out, _ = command(zoo)
    assert (code, out) == (0, f"{copy}: the canonical (phase) copy of {zoo} is there already\n")
    assert (copy / "zoo.json").read_text() == content


def test_anything_else_in_its_place_is_refused(zoo, command, tmp_path):
    command(zoo)
    for words in (
        ["--out", zoo],  # the zoo itself
        ["--out", tmp_path],  # no zoo
    ):
        code, out, err = command(zoo, *words)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "made by another recipe" in err or "is not a zoo of this recipe" in err
    file = tmp_path / "zoo_canon" / "zoo.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"provenance": {}}))  # edited
    assert command(zoo)[0] == 2


def test_a_canonical_zoo_is_not_canonicalised_again(zoo, command, tmp_path):
    command(zoo)
    code, _, err = command(tmp_path / "zoo_canon")
    assert code == 2
    assert err.endswith("zoo_canon, which has removed phase already\n")
    assert command(tmp_path / "zoo_canon", "--data.canonicalize", "[phase, scale]")[0] == 2  # sines have no scale
    code, _, err = command(zoo, "--data.canonicalize", "[]")
    assert (code, err.endswith(f"nothing to remove from {zoo}\n")) == (2, True)


def test_missing_zoo(command, tmp_path):
    code, out, err = command(tmp_path / "nothing")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "no folders mnist_png" in err


def test_half_precision_zoos_are_canonical_in_single(command, tmp_path, random_params):
    params = random_params(NetSpec.mlp([2, 4, 3, 1], "sine", 30.0), 20).to(torch.float16)
    write_zoo(tmp_path / "half", [Networks((params,), {"label": torch.arange(20) % 10})], SPLITS, {})
    assert command(tmp_path / "half")[0] == 0
    assert same(read(tmp_path / "half"), read(tmp_path / "half_canon"))
    assert open_zoo(tmp_path / "half_canon").params.biases[0].dtype == torch.float32


def test_scale_after_phase_of_mixed_networks(command, tmp_path, random_params):
    params = random_params(NetSpec.mlp([2, 4, 1], "hetero"), 20, [BUILT_IN.index("relu"), 0] * 10)
    zoo = make(tmp_path / "mixed", params, {})
    assert command(zoo)[0] == 0
    assert command(tmp_path / "mixed_canon", "--data.canonicalize", "[phase, scale]")[0] == 0
    assert open_zoo(tmp_path / "mixed_canon_canon").canonical == ("phase", "scale")
    assert same(read(tmp_path / "mixed_canon_canon"), read(zoo, canonicalize=("phase", "scale")))
