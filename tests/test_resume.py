"""The real script, stopped and resumed, on one process and on two; what it leaves is read from its files."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from scalegmn.networks import NetParams
from scalegmn.training.checkpoint import read_tensors, state_files
from scalegmn.zoos.zoo_format import Networks, write_zoo

ROOT = Path(__file__).parents[1]
TIMES = ("networks_per_second", "data_wait", "memory_gb", "seconds")
SMALL = {
    **{"data.dataset_path": "zoo", "batch_size": 8, "train_args.device": "cpu", "train_args.num_epochs": 4},
    "optimization.scheduler_args.warmup_steps": 5,
}
SCALEGMN = {"scalegmn_args.hidden_dim": 8, "scalegmn_args.num_layers": 2, "scalegmn_args.out_dim": 3}
STATNN = {"model": "statnn", "statnn_args.hidden_dim": 8, "statnn_args.out_dim": 3, "data.dataset_path": "mixed"}
RANDOM = {"scalegmn_args.dropout": 0.2, "data.augment.noise": 0.1, "optimization.ema_decay": 0.9}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a zoo of 81 networks: batches of 8 leave one over, which only one of two processes gets; and with
    one of as many networks of three architectures."""
    folder = tmp_path_factory.mktemp("home")
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(81, *shape, generator=generator) / 2 for shape in ((5, 2), (1, 5))]
    biases = [torch.randn(81, size, generator=generator) / 5 for size in (5, 1)]
    params = NetParams.from_tensors(weights, biases, "sine")
    splits = {"train": torch.arange(49), "val": torch.arange(49, 66), "test": torch.arange(66, 81)}
    write_zoo(folder / "zoo", [Networks((params,), {"label": torch.arange(81) % 3})], splits, {})
    nets = [NetParams.cat([params[k::3] for k in range(3)])[:27]]
    for layout in ([2, 4, 1], [2, 3, 4, 1]):
        shapes = [*zip(layout[1:], layout, strict=False)]
        weights = [torch.randn(27, *shape, generator=generator) / 2 for shape in shapes]
        biases = [torch.randn(27, size, generator=generator) / 5 for size, _ in shapes]
        nets.append(NetParams.from_tensors(weights, biases, "sine"))
    order = torch.randperm(81, generator=generator)
    splits = {name: order[rows] for name, rows in splits.items()}
    write_zoo(folder / "mixed", [Networks(tuple(nets), {"label": torch.arange(81) // 27})], splits, {})
    return folder


def words(run_dir, model=SCALEGMN, **options):
    settings = {**SMALL, **model, **options, "run_dir": run_dir}
    return [str(ROOT / "inr_classification.py"), *(f"--{key}={value}" for key, value in settings.items())]


def start(home, *command, launcher=(sys.executable,), **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*launcher, *command], cwd=home, env=environment, **pipes)


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def run(home, *command, **options):
    code, out, err = finish(start(home, *command, **options))
    assert code == 0, err
    return out


def rows(folder):
    """Lines of metrics.jsonl that are whole, without what is measured in seconds."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in found]


def wait_for_rows(process, folder, number):
    while len(rows(folder)) < number:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def assert_same(first, second):
    assert rows(first) == rows(second)
    for name in ("best", "last"):
        files = [folder / "checkpoints" / f"{name}.safetensors" for folder in (first, second)]
        assert files[0].read_bytes() == files[1].read_bytes()


@pytest.fixture(scope="module")
def whole(home):
    """A run that nothing stops."""
    run(home, *words("whole", **RANDOM))
    assert len(rows(home / "whole")) == 4
    return home / "whole"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signals(home, whole, number):
    folder = home / number.name
    process = start(home, *words(number.name, **RANDOM))
    wait_for_rows(process, folder, 2)
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == 75
    assert f"stopped: {number.name} after step" in err
    assert f"go on with --resume {number.name}" in err
    assert not (folder / "summary.json").exists()
    assert "going on after step" in run(home, str(ROOT / "inr_classification.py"), f"--resume={number.name}")
    assert_same(folder, whole)
    assert not state_files(folder)


@pytest.mark.slow
def test_several_architectures(home):
    """A run on networks of several, stopped and resumed to the bit; and that of two processes."""
    settings = {"data.augment.noise": 0.1, "statnn_args.dropout": 0.2, "train_args.num_epochs": 20}
    run(home, *words("mixed_whole", STATNN, **settings))
    process = start(home, *words("mixed_stopped", STATNN, **settings))
    wait_for_rows(process, home / "mixed_stopped", 1)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 75
    run(home, str(ROOT / "inr_classification.py"), "--resume=mixed_stopped")
    assert_same(home / "mixed_stopped", home / "mixed_whole")
    for name, devices in (("mixed_one", 1), ("mixed_two", 2)):
        run(home, *words(name, STATNN, **{"train_args.devices": devices}))
    for one, other in zip(rows(home / "mixed_one"), rows(home / "mixed_two"), strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)


@pytest.mark.slow
def test_what_is_refused(home):
    settings = {**RANDOM, "train_args.num_epochs": 400}
    process = start(home, *words("long", **settings))
    wait_for_rows(process, home / "long", 1)
    process.send_signal(signal.SIGSTOP)
    code, _, err = finish(start(home, *words("long", **settings, resume="auto")))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "another process is training there" in err
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 75
    code, _, err = finish(start(home, *words("long", **settings)))
    assert (code, len(err.splitlines())) == (2, 1)
    assert "holds an unfinished run; go on with --resume long" in err
    changed = {"train_args.num_epochs": 5, "optimization.ema_decay": "null"}
    code, _, err = finish(start(home, *words("long", **{**settings, **changed}, resume="long")))
    assert (code, len(err.splitlines())) == (2, 1)
    for part in ("train_args.num_epochs 400 (found 5)", "optimization.ema_decay 0.9 (found None)"):
        assert part in err


@pytest.mark.slow
def test_a_second_interruption_ends_at_once(home):
    process = start(home, *words("twice", **{"train_args.num_epochs": 1000, "batch_size": 49}))
    wait_for_rows(process, home / "twice", 1)
    process.send_signal(signal.SIGSTOP)  # both signals arrive before the step is finished
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] in (-signal.SIGINT, 75)  # 75: the step was finished in between


@pytest.mark.slow
def test_killed_at_any_moment(home):
    """kill -9 at twenty random moments of one run that is resumed each time: it ends as the one that nobody killed."""
    folder, moments, kills = home / "killed", random.Random(0), 0
    settings = {**RANDOM, "train_args.num_epochs": 50, "train_args.checkpoint_minutes": 0.0}
    run(home, *words("unharmed", **settings))
    while kills < 20:
        before = state_files(folder)
        process = start(home, *words("killed", **settings, resume="auto"))
        while state_files(folder) == before and process.poll() is None:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.2))
        assert process.poll() is None, process.communicate()  # else there were fewer moments
        process.kill()
        process.communicate()
        kills += 1
        for path in state_files(folder):
            read_tensors(path)  # raises ValueError where it is damaged
    run(home, *words("killed", **settings, resume="auto"))
    assert_same(folder, home / "unharmed")


LAUNCHERS = {
    "torchrun": (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    "devices": (sys.executable,),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_do_what_one_does(home, launcher):
    """Same global batch, same parameters and metrics to 1e-5; a last batch of 1 network leaves a process without."""
    if not (home / "one").exists():
        run(home, *words("one"))
    devices = 2 if launcher == "devices" else 1
    out = run(home, *words(launcher, **{"train_args.devices": devices}), launcher=LAUNCHERS[launcher])
    assert out.count("train_loss") == 1  # only the first process prints
    found, expected = rows(home / launcher), rows(home / "one")
    assert len(found) == 4
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-5)
    tensors, others = (read_tensors(home / name / "checkpoints/last.safetensors")[0] for name in (launcher, "one"))
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[name], rtol=1e-5, atol=1e-5)
    assert json.loads((home / launcher / "summary.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_two_processes_stop_and_go_on(home):
    settings = {**RANDOM, "train_args.devices": 2}
    run(home, *words("both", **settings))
    process = start(home, *words("stopped", **settings))
    wait_for_rows(process, home / "stopped", 1)
    process.send_signal(signal.SIGTERM)
    assert finish(process)[0] == 75
    alone = finish(start(home, str(ROOT / "inr_classification.py"), "--resume=stopped", "--train_args.devices=1"))
    assert alone[0] == 2
    assert "found 1 processes, expected 2" in alone[2]
    run(home, str(ROOT / "inr_classification.py"), "--resume=stopped")
    assert_same(home / "stopped", home / "both")


@pytest.mark.slow
def test_srun(home):
    """Two tasks with what srun tells them; SLURM's signal stops both, and the highest exit code says so."""
    job = {"SLURM_JOB_ID": "12345", "SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": "0"}
    job |= dict.fromkeys(("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_STEP_NUM_TASKS"), "2")
    job |= dict.fromkeys(("SLURM_NNODES", "SLURM_STEP_NUM_NODES"), "1")
    command = words("srun", **{"train_args.num_epochs": 400})
    tasks = [start(home, *command, **job, SLURM_PROCID=str(k), SLURM_LOCALID=str(k)) for k in range(2)]
    wait_for_rows(tasks[0], home / "srun", 1)
    for task in tasks:
        task.send_signal(signal.SIGUSR1)
    assert [finish(task)[0] for task in tasks] == [75, 0]
    assert state_files(home / "srun")


EVALUATE = """
import os, sys, torch
from scalegmn.zoos.loader import DataConfig
from scalegmn.models import ScaleGMNConfig
from scalegmn.tasks.classification import Classification
if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")
torch.manual_seed(0)
config = ScaleGMNConfig(hidden_dim=8, num_layers=2, out_dim=3)
task = Classification(DataConfig("zoo"), 4, config)
model = config.build(task.spec)
metrics = task.evaluate(model, sys.argv[1], torch.device("cpu"))
if os.environ.get("RANK", "0") == sys.argv[2]:
    print("metrics", metrics)
"""


@pytest.mark.slow
def test_evaluation_of_two_processes_is_that_of_one(home):
    """To the bit, and in both."""
    (home / "evaluate.py").write_text(EVALUATE)
    (alone,) = [line for line in run(home, "evaluate.py", "val", "0").splitlines() if line.startswith("metrics")]
    for rank in ("0", "1"):
        out = run(home, "evaluate.py", "val", rank, launcher=LAUNCHERS["torchrun"])
        assert [line for line in out.splitlines() if line.startswith("metrics")] == [alone]


@pytest.mark.slow
def test_bad_input_of_two_processes_is_said_once(home):
    code, _, err = finish(start(home, *words("bad", **{"train_args.devices": 2, "data.dataset_path": "nothing"})))
    assert code == 2
    assert err.count("error:") == 1


@pytest.mark.slow
def test_not_finite(home):
    settings = {"optimization.optimizer_args.lr": 1e30, "optimization.scheduler_args.decay": "none"}
    code, _, err = finish(start(home, *words("bad", **settings)))
    assert code == 3
    assert len(err.splitlines()) == 1
    assert "bad/not_finite.safetensors" in err
    assert read_tensors(home / "bad" / "not_finite.safetensors")[0]["rows"].shape == (8,)
