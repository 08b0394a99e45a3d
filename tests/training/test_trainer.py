"""The loop on a small task of its own: it knows only the protocol."""

import json
import math
import os
import random
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision

from scalegmn.reporting.run_folder import Run
from scalegmn.training.checkpoint import load_checkpoint, read_tensors, state_files, write_tensors
from scalegmn.training.config import TrainConfig
from scalegmn.training.launch import launch
from scalegmn.training.optimization import OptimizationConfig, OptimizerConfig, ScheduleConfig
from scalegmn.training.trainer import Stopped, Trainer, backward_in_micro_batches

FAST = OptimizationConfig(optimizer_args=OptimizerConfig(lr=0.05), scheduler_args=ScheduleConfig(warmup_steps=0))


class Line:
    """Least squares: y = 2 x - 1."""

    monitor = "loss"
    maximize = False
    steps_per_epoch = 4
    data_id = "line"

    def __init__(self):
        self.evaluated = []
        self.x = torch.linspace(-1, 1, 32)[:, None]

    def prepare(self, model):
        self.prepared = True

    def shuffle(self, generator):
        return torch.randperm(32, generator=generator).split(8)

    def train_batches(self, batches, generator, device):
        for rows in batches:
            yield self.x[rows], 2 * self.x[rows] - 1

    def loss(self, model, inputs, target):
        return (model(inputs) - target).square().mean()

    @torch.no_grad()
    def evaluate(self, model, split, device, figures=None):
        model.eval()
        self.evaluated.append(split)
        if figures is not None:
            (figures / f"{split}.txt").write_text("drawn")
        return {"loss": self.loss(model, self.x, 2 * self.x - 1).item()}

    def state(self):
        return {}

    def set_state(self, state):
        pass

    def identity(self):
        return {"line": 1}


class OneNumber(torch.nn.Linear):
    """y = a x + b, which wants its batches of 8 in parts of 3, 3 and 2."""

    def __init__(self):
        super().__init__(1, 1)

    def networks_at_once(self, device):
        return 3


class WorseAfterThreeEpochs(Line):
    """Validation that is best at epoch 2."""

    def evaluate(self, model, split, device, figures=None):
        super().evaluate(model, split, device, figures)
        return {"loss": float(abs(self.evaluated.count("val") - 3)) if split == "val" else -1.0}


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run", "a: 1\n", {"a": 1})


def build(task, run, optimization=FAST, **options):
    config = TrainConfig(device="cpu", **{"precision": "fp32", **options})
    torch.manual_seed(config.seed)
    fabric = launch(config.device, config.devices, config.precision)
    return Trainer(fabric, task, OneNumber(), config, optimization, run)


def train(task, run, **options):
    trainer = build(task, run, **options)
    return trainer.model, trainer.fit()


def test_fits_and_writes_everything(run, drawn):
    task = Line()
    model, summary = train(task, run, num_epochs=30)
    assert summary["test_loss"] < 1e-3
    assert model.weight.item() == pytest.approx(2, abs=0.1)
    assert task.prepared
    assert task.evaluated == ["val"] * 30 + ["test"]  # the test split is looked at once
    rows = run.metrics()
    assert [row["epoch"] for row in rows] == list(range(30))
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert rows[0]["step"] == 4
    found = json.loads((run.folder / "summary.json").read_text())
    assert found["parameters"] == 2
    assert found["data"] == {"line": 1}
    assert found["versions"]["torch"] == torch.__version__
    assert found["seconds"] > 0
    assert (run.folder / "config.yml").read_text() == "a: 1\n"
    assert (run.folder / "figures" / "test.txt").exists()
    losses = {line.get_label(): line.get_ydata() for line in drawn["learning_curves.png"].axes[0].lines}
    assert losses["train"].tolist() == [row["train_loss"] for row in rows]
    assert losses["val"].tolist() == [row["val_loss"] for row in rows]


def test_early_stopping_tests_the_best_epoch(run):
    task = WorseAfterThreeEpochs()
    model, summary = train(task, run, num_epochs=50, patience=4)
    assert (summary["best_epoch"], summary["epochs"]) == (2, 7)
    best = torch.nn.Linear(1, 1)
    assert load_checkpoint(run.folder / "checkpoints" / "best.safetensors", best) == {"epoch": 2, "val_loss": 0.0}
    assert torch.equal(best.weight, model.weight)  # the model that was tested and is returned
    last = torch.nn.Linear(1, 1)
    assert load_checkpoint(run.folder / "checkpoints" / "last.safetensors", last)["epoch"] == 6
    assert not torch.equal(last.weight, best.weight)


def test_what_the_model_adds_to_the_loss_is_minimised_too(run):
    trainer = build(Line(), run, num_epochs=30)

    def add(model, inputs, output):
        if model.training:
            model.auxiliary_loss = 100 * (model.bias - 4).square().sum()

    trainer.model.register_forward_hook(add)
    trainer.fit()
    last, _ = read_tensors(run.folder / "checkpoints" / "last.safetensors")
    assert last["bias"].item() == pytest.approx(4, abs=0.2)


def test_same_seed_same_numbers(tmp_path):
    losses = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = Run(tmp_path / name, "", {})
        train(Line(), run, num_epochs=2, seed=seed)
        losses.append([row["train_loss"] for row in run.metrics()])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_stops_when_the_loss_is_not_finite(run):
    class Diverging(Line):
        def loss(self, model, inputs, target):
            return super().loss(model, inputs, target) * math.nan

    with pytest.raises(FloatingPointError, match=r"epoch 0, step 0: loss nan, norm .*not_finite.safetensors"):
        train(Diverging(), run, num_epochs=3)
    assert not (run.folder / "summary.json").exists()


def test_finished_run_is_never_overwritten(run):
    train(Line(), run, num_epochs=1)
    before = (run.folder / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="holds a finished run"):
        Run(run.folder, "", {})
    assert (run.folder / "metrics.jsonl").read_text() == before


def test_checkpoint_round_trip(tmp_path):
    model, other = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    model(torch.randn(8, 3))
    write_tensors(tmp_path / "a.safetensors", model.state_dict(), {"epoch": 3})
    assert load_checkpoint(tmp_path / "a.safetensors", other) == {"epoch": 3}
    assert torch.equal(model.running_mean, other.running_mean)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_parts_add_up_to_the_gradient_of_the_batch():
    torch.manual_seed(0)
    model, x = torch.nn.Linear(4, 2).double(), torch.randn(10, 4, dtype=torch.float64)
    sizes = []

    def loss(inputs, target):
        sizes.append(len(target))
        return (model(inputs) - target).square().mean()

    whole = loss(x, x[:, :2])
    expected = torch.autograd.grad(whole, list(model.parameters()))
    found = backward_in_micro_batches(loss, x, x[:, :2], 6)
    assert sizes == [10, 5, 5]
    assert not found.requires_grad
    torch.testing.assert_close(found, whole.detach(), rtol=1e-12, atol=0)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-15)


# Stopping and going on


class Noisy(Line):
    """Targets with noise of every generator; the run is asked to stop in the given step, counted from 1."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.steps, self.stop_at, self.trainer = 0, stop_at, None

    def train_batches(self, batches, generator, device):
        for inputs, target in super().train_batches(batches, generator, device):
            self.steps += 1
            if self.steps == self.stop_at:
                self.trainer.signals.received = "SIGTERM"
            noise = random.gauss(0, 1) + np.random.normal() + torch.randn(()) + torch.randn((), generator=generator)
            yield inputs, target + 0.1 * noise


MANY = replace(FAST, ema_decay=0.5, scheduler_args=ScheduleConfig(2, "plateau", 1))
TIMES = ("networks_per_second", "data_wait", "memory_gb", "seconds")


def start(folder, stop_at=None, task=None, resume=False, **options):
    random.seed(0)
    np.random.seed(0)
    task = task or Noisy(stop_at)
    options = {"num_epochs": 3, "patience": 2, **options}
    task.trainer = build(task, Run(folder, "", {}, resume=resume), MANY, **options)
    return task.trainer


def results(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    files = [(folder / "checkpoints" / f"{name}.safetensors").read_bytes() for name in ("best", "last")]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows], files


@pytest.mark.parametrize("stop_at", [1, 3, 4, 5, 12])
def test_going_on_equals_never_having_stopped(tmp_path, stop_at):
    """Within an epoch, after its last step, after the last step of all."""
    start(tmp_path / "whole").fit()
    with pytest.raises(Stopped, match=f"SIGTERM after step .* --resume {tmp_path}"):
        start(tmp_path / "parts", stop_at).fit()
    assert not (tmp_path / "parts" / "summary.json").exists()
    resumed = start(tmp_path / "parts", resume=True)
    summary = resumed.fit()
    assert resumed.task.steps == 12 - stop_at
    assert results(tmp_path / "parts") == results(tmp_path / "whole")
    assert len(results(tmp_path / "whole")[0]) == 3
    assert summary["epochs"] == 3
    assert state_files(tmp_path / "parts") == []


def test_going_on_in_another_precision_is_said(tmp_path, capsys):
    """As `auto` may choose on another machine."""
    with pytest.raises(Stopped):
        start(tmp_path / "run", stop_at=5, precision="bf16-mixed").fit()
    summary = start(tmp_path / "run", resume=True, precision="fp32").fit()
    note = "note: goes on in fp32; so far it was bf16-mixed (train_args.precision)"
    assert capsys.readouterr().out.count(note) == 1
    assert summary["precision"] == "fp32"


def test_a_signal_during_the_test_does_not_stop_it(tmp_path):
    class Signalled(Noisy):
        def evaluate(self, model, split, device, figures=None):
            if split == "test":
                os.kill(os.getpid(), signal.SIGUSR1)  # would end the process
            return super().evaluate(model, split, device, figures)

    trainer = start(tmp_path / "a", task=Signalled())
    assert trainer.fit()["epochs"] == 3
    assert trainer.signals.received == "SIGUSR1"


def test_early_stopping_goes_on(tmp_path):
    """The count of epochs without improvement survives."""

    class Worsening(Noisy):
        def evaluate(self, model, split, device, figures=None):
            super().evaluate(model, split, device, figures)
            return {"loss": float(self.trainer.progress.epoch)}

    with pytest.raises(Stopped):
        start(tmp_path / "a", task=Worsening(7), num_epochs=9).fit()
    summary = start(tmp_path / "a", task=Worsening(), num_epochs=9, resume=True).fit()
    assert (summary["epochs"], summary["best_epoch"]) == (3, 0)


def test_damaged_state_falls_back_to_the_one_before(tmp_path, capsys):
    start(tmp_path / "whole").fit()
    with pytest.raises(Stopped):
        start(tmp_path / "parts", 7).fit()
    newest, before = state_files(tmp_path / "parts")
    assert (newest.name, before.name) == ("state-0000000007.safetensors", "state-0000000004.safetensors")
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    resumed = start(tmp_path / "parts", resume=True)
    resumed.fit()
    assert f"{newest}: damaged (its checksum differs); trying the state before" in capsys.readouterr().err
    assert resumed.task.steps == 8
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def test_all_states_damaged(tmp_path):
    with pytest.raises(Stopped):
        start(tmp_path / "a", 7).fit()
    for path in state_files(tmp_path / "a"):
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="all its states are damaged; start a new run"):
        start(tmp_path / "a", resume=True).fit()


def test_what_a_run_does_not_go_on_with(tmp_path):
    with pytest.raises(Stopped):
        start(tmp_path / "a", 7).fit()
    with pytest.raises(ValueError, match="holds an unfinished run; go on with --resume"):
        start(tmp_path / "a")
    other = Noisy()
    other.data_id = "circle"
    with pytest.raises(ValueError, match="was trained on other data"):
        start(tmp_path / "a", task=other, resume=True).fit()


def test_state_of_another_model(tmp_path):
    with pytest.raises(Stopped):
        start(tmp_path / "a", 7).fit()
    for path in state_files(tmp_path / "a"):
        tensors, metadata = read_tensors(path)
        write_tensors(path, {**tensors, "model.weight": torch.zeros(1, 2)}, metadata)
    with pytest.raises(ValueError, match="its state is of another model or version; start a new run"):
        start(tmp_path / "a", resume=True).fit()


def test_state_of_another_version(tmp_path):
    """A state whose schedule is stored in a form that this version does not know is refused."""
    with pytest.raises(Stopped):
        start(tmp_path / "a", 7).fit()
    for path in state_files(tmp_path / "a"):
        tensors, metadata = read_tensors(path)
        write_tensors(path, tensors, {**metadata, "schedule": {"position": 7}})
    with pytest.raises(ValueError, match="its state is of another model or version; start a new run"):
        start(tmp_path / "a", resume=True).fit()


def test_states_are_saved_as_often_as_wanted(tmp_path):
    trainer = start(tmp_path / "a", checkpoint_minutes=0.0)
    trainer.train_epoch()
    assert [path.stem for path in state_files(tmp_path / "a")] == ["state-0000000004", "state-0000000003"]
    rare = start(tmp_path / "b")
    rare.train_epoch()
    assert state_files(tmp_path / "b") == []


# What a step does


def test_average_by_hand(run):
    """The first average is the parameters after the first step; then half of it and half of the new ones."""
    task = Line()
    trainer = build(task, run, replace(FAST, ema_decay=0.5), num_epochs=1)
    seen, plain = [], task.loss

    def loss(model, inputs, target):
        seen.append(trainer.model.weight.item())
        return plain(model, inputs, target)

    task.loss = loss
    trainer.train_epoch()
    after = [*seen[3::3], trainer.model.weight.item()]  # three parts per batch
    average = after[0]
    for weight in after[1:]:
        average = 0.5 * average + 0.5 * weight
    assert len(after) == 4
    task.loss = plain
    trainer._end_epoch()
    last, _ = read_tensors(run.folder / "checkpoints" / "last.safetensors")
    assert last["weight"].item() == pytest.approx(average)
    val = run.metrics()[0]["val_loss"]
    with torch.no_grad():
        expected = (task.x * last["weight"].T + last["bias"] - 2 * task.x + 1).square().mean()
    assert val == pytest.approx(expected.item())


def test_rows_say_how_training_went(run):
    """Gradient norms before clipping, and what the machine did."""
    trainer = build(Line(), run, replace(FAST, clip_grad_max_norm=1e-3), num_epochs=1)
    norms, plain = [], trainer.task.train_batches

    def watched(batches, generator, device):
        for x, y in plain(batches, generator, device):
            error = 2 * (trainer.model(x) - y).detach()
            norms.append(math.hypot((error * x).mean(), error.mean()))
            yield x, y

    trainer.task.train_batches = watched
    trainer.fit()
    (row,) = run.metrics()
    assert len(norms) == 4
    assert row["grad_norm"] == pytest.approx(sum(norms) / 4)
    assert row["grad_norm_max"] == pytest.approx(max(norms))
    assert 0 < row["data_wait"] < 1
    assert row["memory_gb"] > 0.01


class BadBatch(Noisy):
    """The loss of the sixth batch is not a number."""

    def loss(self, model, inputs, target):
        return super().loss(model, inputs, target) * (math.nan if self.steps == 6 else 1)


def test_evidence_reproduces_the_step(tmp_path):
    """The state is that before the step, so that the parameters are unharmed; the rows are the batch's."""
    with pytest.raises(FloatingPointError, match=r"epoch 1, step 1: loss nan, norm of the gradient nan; .*not_finite"):
        start(tmp_path / "a", task=BadBatch()).fit()
    tensors, metadata = read_tensors(tmp_path / "a" / "not_finite.safetensors")
    assert math.isnan(metadata["loss"])
    good = start(tmp_path / "b")
    good.train_epoch()
    good._end_epoch()
    good.signals.received = "SIGTERM"
    with pytest.raises(Stopped):
        good.train_epoch()
    assert torch.equal(tensors["model.weight"], good.model.weight)
    again = start(tmp_path / "c", task=BadBatch())
    again._restore({key: value for key, value in tensors.items() if key != "rows"}, metadata)
    assert torch.equal(again._shuffled()[1], tensors["rows"])
    again.task.steps = 5
    with pytest.raises(FloatingPointError, match="epoch 1, step 1: loss nan"):
        again.train_epoch()


def test_overflow_of_a_scaled_loss_skips_the_step(run):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    fabric = Fabric(accelerator="cpu", plugins=MixedPrecision("16-mixed", "cpu", scaler))
    fabric.launch()
    config = TrainConfig(device="cpu", precision="fp16-mixed", num_epochs=40)
    torch.manual_seed(0)
    trainer = Trainer(fabric, Line(), OneNumber(), config, FAST, run)
    trainer.model.weight.data.fill_(30.0)
    trainer.train_epoch()
    assert trainer.progress.grad_norm == 0  # no step was taken
    assert trainer.progress.step == 4
    assert 1 < scaler.get_scale() < 2.0**127
    assert trainer.model.weight.isfinite().all()


def test_precisions_that_a_cpu_lacks():
    for precision in ("fp16-mixed", "tf32"):
        with pytest.raises(ValueError, match=f"train_args.precision: {precision} needs a GPU"):
            TrainConfig(device="cpu", precision=precision).check_device()


def test_compiling_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    TrainConfig(device="cpu").check_device()
    with pytest.raises(ValueError, match=r"train_args\.compile: needs a C\+\+ compiler, found no no-such-compiler"):
        TrainConfig(device="cpu", compile=True).check_device()


class OnDevice(Line):
    """The same, with batches on the device."""

    def train_batches(self, batches, generator, device):
        for inputs, target in super().train_batches(batches, generator, device):
            yield inputs.to(device), target.to(device)

    def evaluate(self, model, split, device, figures=None):
        self.x = self.x.to(device)
        metrics = super().evaluate(model, split, device, figures)
        self.x = self.x.cpu()
        return metrics


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16-mixed", "fp16-mixed"])
def test_trains_on_a_gpu(tmp_path, precision):
    """To a loss as on the CPU, stopped and resumed on the way, with the peak memory of torch."""
    config = TrainConfig(device="cuda", num_epochs=30, precision=precision)

    def trainer(resume=False):
        torch.manual_seed(0)
        run = Run(tmp_path / "run", "", {}, resume=resume)
        return Trainer(launch("cuda", 1, precision), OnDevice(), OneNumber(), config, FAST, run)

    first = trainer()
    first.train_epoch()
    first._end_epoch()
    first.signals.received = "SIGTERM"
    with pytest.raises(Stopped):
        first.train_epoch()
    second = trainer(resume=True)
    summary = second.fit()
    assert summary["device"].startswith("cuda")
    assert summary["test_loss"] < 1e-2
    assert second.model.weight.item() == pytest.approx(2, abs=0.15)
    assert 0 < second.run.metrics()[-1]["memory_gb"] < 1
