import json

import pytest
import torch
from commands import FORKS

from scalegmn.networks import NetSpec
from scalegmn.zoos.shards import Shards, lock
from scalegmn.zoos.zoo_format import open_zoo

PLAN = {"seed": 1, "sizes": (3, 2)}
SPLITS = {"train": torch.tensor([0, 4])}


@pytest.fixture
def params(random_params):
    return random_params(NetSpec.mlp([2, 4, 1], "sine"), 5)


def fill(shards, params, numbers):
    for number in numbers:
        rows = torch.arange(5).split(2)[number]
        shards.write(number, params[rows], label=rows)


def test_zoo_in_the_order_of_the_shards(tmp_path, params):
    shards = Shards(tmp_path / "zoo", PLAN, 3)
    assert (shards.finished, shards.missing()) == (False, [0, 1, 2])
    fill(shards, params, [2, 0])
    again = Shards(tmp_path / "zoo", PLAN, 3)
    assert again.missing() == [1]
    fill(again, params, [1])
    again.merge(SPLITS, {"images": "noise"})
    zoo = open_zoo(tmp_path / "zoo")
    assert torch.equal(zoo.params.flatten(), params.flatten())
    assert zoo.columns["label"].tolist() == [0, 1, 2, 3, 4]
    assert zoo.provenance == {"recipe": {"seed": 1, "sizes": [3, 2]}, "images": "noise"}
    assert [path.name for path in tmp_path.iterdir()] == ["zoo"]
    assert (shards.finished, shards.missing()) == (True, [])
    shards.merge(SPLITS, {"images": "of the other process"})
    assert open_zoo(tmp_path / "zoo").provenance["images"] == "noise"


def test_another_plan_is_refused(tmp_path, params):
    fill(Shards(tmp_path / "zoo", PLAN, 3), params, [0])
    with pytest.raises(ValueError, match=r"zoo.partial: made by another recipe \(seed 1\)"):
        Shards(tmp_path / "zoo", {**PLAN, "seed": 2}, 3)
    shards = Shards(tmp_path / "zoo", PLAN, 3)
    fill(shards, params, [1, 2])
    shards.merge(SPLITS, {})
    with pytest.raises(ValueError, match=r"zoo: made by another recipe \(seed 1\)"):
        Shards(tmp_path / "zoo", {**PLAN, "seed": 2}, 3)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match=r"mine: exists and is not a zoo of this recipe"):
        Shards(tmp_path / "mine", PLAN, 3)
    (tmp_path / "zoo" / "zoo.json").write_text(json.dumps({"provenance": {}}))
    with pytest.raises(ValueError, match=r"zoo: exists and is not a zoo of this recipe"):
        Shards(tmp_path / "zoo", PLAN, 3)


def _take_turns(out, log, number):
    Shards(out, PLAN, 3)
    with lock(out), lock(out):  # it may be entered again
        for word in ("in", "out"):
            with open(log, "a") as file:
                file.write(f"{number} {word}\n")


def test_lock_excludes_other_processes(tmp_path):
    log = tmp_path / "log"
    processes = [FORKS.Process(target=_take_turns, args=(tmp_path / "zoo", log, k)) for k in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    lines = [line.split() for line in log.read_text().splitlines()]
    assert [word for _, word in lines] == ["in", "out"] * 3
    assert all(a[0] == b[0] for a, b in zip(lines[::2], lines[1::2], strict=True))
