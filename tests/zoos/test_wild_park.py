"""The CNN Wild Park, in the layout of its authors' scripts; nothing in it is executed."""

import json
from pathlib import Path

import pytest
import torch
from published import WILD_PARK, save, save_as_omegaconf, wild_park_config, write_wild_park

from scalegmn.networks import LayerSpec, NetSpec
from scalegmn.networks.cnn import evaluate_cnn
from scalegmn.zoos import convert
from scalegmn.zoos.loader import DataConfig, open_data
from scalegmn.zoos.published.wild_park import _read_network
from scalegmn.zoos.zoo_format import verify_zoo

FIXTURE = Path(__file__).parents[1] / "fixtures" / "wild_park" / "checkpoint.pt"
FIRST = "cifar10_zooV2/NN_tune_trainable_0a/checkpoint_000010/checkpoint.pt"


@pytest.fixture
def park(tmp_path, generator, monkeypatch):
    monkeypatch.setattr(convert, "SHARD", 3)  # the same architecture in several shards, and a run across two
    return tmp_path / "park", write_wild_park(tmp_path / "park", generator)


def test_the_very_numbers(park):
    root, states = park
    zoo = verify_zoo(open_data(DataConfig(str(root), "cnn_wild_park")).path)
    assert len(zoo) == len(states) == 8
    assert [str(params.spec) for params in zoo.nets] == [
        "CNN [3, 4, 8, 10] (gelu, relu)",
        "CNN [3, 8, 4, 4, 10] (identity, leaky_relu, tanh, residual 0 -> 2)",
        "CNN [3, 4, 8, 10] (relu, sigmoid)",
    ]
    singles = [params[k : k + 1] for params in zoo.nets for k in range(len(params))]
    split_of = {row: split for split, rows in zoo.splits.items() for row in rows.tolist()}
    seen = set()
    for row, params in enumerate(singles):
        run, step = list(WILD_PARK)[zoo.columns["network"][row]], int(zoo.columns["epoch"][row])
        state, score = states[split_of[row], run, step]
        seen.add((run, step))
        assert zoo.columns["test_accuracy"][row] == torch.tensor(score)
        tensors = [tensor[0] for pair in zip(params.weights, params.biases, strict=True) for tensor in pair]
        for tensor, own in zip(tensors, state.values(), strict=True):
            assert torch.equal(tensor, own)
    assert len(seen) == 8
    assert open_data(DataConfig(str(root), "cnn_wild_park")).sha256 == zoo.sha256


def test_extracted_elsewhere(park):
    root, _ = park
    (root / "cifar10_zooV2").rename(root.parent / "runs")
    config = DataConfig(str(root.parent / "runs"), "cnn_wild_park", str(root / "cnn_park_splits.json"))
    assert len(open_data(config)) == 8


def test_a_checkpoint_by_the_real_libraries():
    """Written by torch and OmegaConf 2.4 as the authors' trainer does, with paths and a dataclass of its own inside."""
    params = _read_network(FIXTURE)
    layers = (LayerSpec(3, 4, (3, 3), "gelu"), LayerSpec(4, 2, (1, 1), "identity"))
    layers += (LayerSpec(2, 3, (3, 3), "leaky_relu", residual=0), LayerSpec(3, 10))
    assert params.spec == NetSpec(layers)
    assert evaluate_cnn(params, torch.ones(1, 3, 8, 8), stride=1).isfinite().all()
    assert params.weights[2].std() > 0.05


def changed(root, change):
    """The splits, changed."""
    file = root / "cnn_park_splits.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def set_config(root, *arguments, **values):
    """Another description of the first network."""
    state = _read_state(root / FIRST)
    config = wild_park_config(*arguments)
    config._content.update(values)
    save_as_omegaconf({"model": state, "config": config}, root / FIRST)


def _read_state(path):
    params = _read_network(path)
    pairs = zip(params.weights, params.biases, strict=True)
    return {
        f"{k}.{kind}": t[0] for k, pair in enumerate(pairs) for kind, t in zip(("weight", "bias"), pair, strict=True)
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: changed(root, lambda s: s.pop("val")), "cnn_park_splits.json: expected JSON"),
        (lambda root: changed(root, lambda s: s["train"]["score"].pop()), "cnn_park_splits.json: expected JSON"),
        (lambda root: changed(root, lambda s: s["val"]["score"].__setitem__(0, 50)), r"score\" \(0 to 1\)"),
        (lambda root: changed(root, lambda s: s["test"]["path"].append(FIRST)), "expected JSON"),
        (lambda root: (root / "cnn_park_splits.json").unlink(), "cnn_park_splits.json: no such file"),
        (
            lambda root: (root / FIRST).unlink(),
            "no cifar10_zooV2/.*000010/checkpoint.pt, as in .*set --data.dataset_path",
        ),
        (lambda root: (root / FIRST.replace("10/", "20/")).unlink(), "000020/checkpoint.pt is missing"),
        (lambda root: (root / FIRST).write_bytes(b"PK"), "checkpoint.pt: refused"),
        (lambda root: save({"model": 3}, root / FIRST), "expected a checkpoint with model, a state dict"),
        (lambda root: save({"model": {}, "config": None}, root / FIRST), "config: not the description of a CNN"),
        (lambda root: set_config(root, [3, 4, 8], [3, 5], ["relu", "gelu"], [-1, -1], stride=[2, 2]), "found stride 2"),
        (lambda root: set_config(root, [3, 4, 8], [3, 3], ["relu", "gelu"], [-1, -1]), "model: found shapes"),
        (lambda root: set_config(root, [3, 4, 8], [3, 5], ["relu", "swoosh"], [-1, -1]), "unknown activation 'swoosh'"),
        (lambda root: set_config(root, [3, 4, 8], [3, 5], ["relu", "gelu"], [-1, 1]), "residual: found 1"),
    ],
)
def test_what_is_wrong_is_named(park, change, message):
    root, _ = park
    change(root)
    with pytest.raises(ValueError, match=message) as caught:
        open_data(DataConfig(str(root), "cnn_wild_park"))
    assert "\n" not in str(caught.value)
    assert not list(root.glob("scalegmn-*"))


def test_a_run_in_two_splits(park):
    root, _ = park

    def move(content):
        for key, values in content["train"].items():
            content["test"][key].append(values.pop())

    changed(root, move)
    with pytest.raises(ValueError, match=r"2c is in split .* and in .*, expected runs in one"):
        open_data(DataConfig(str(root), "cnn_wild_park"))


class Hostile:
    """Calls a function when it is unpickled."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("place", ["model", "config", "optimizer"])
@pytest.mark.parametrize("call", ["system", "exec", "open"])
def test_nothing_is_executed(park, tmp_path, place, call):
    import os

    root, _ = park
    proof = tmp_path / "proof"
    calls = {
        "system": (os.system, f"touch {proof}"),
        "exec": (exec, f"open({str(proof)!r}, 'w')"),
        "open": (open, str(proof), "w"),
    }
    content = {"model": _read_state(root / FIRST), "config": None, "optimizer": {}}
    config = wild_park_config(*WILD_PARK["NN_tune_trainable_0a"])
    save_as_omegaconf({**content, "config": config, place: Hostile(*calls[call])}, root / FIRST)
    try:
        open_data(DataConfig(str(root), "cnn_wild_park"))
    except ValueError as error:
        assert "checkpoint.pt: " in str(error)  # noqa: PT017
    assert not proof.exists()
