"""The loop on a small task of its own: it knows only the protocol."""

import json
import math

import pytest
import torch

from scalegmn.log import Run
from scalegmn.train.checkpoint import load_checkpoint, write_tensors
from scalegmn.train.launch import launch
from scalegmn.train.optim import OptimizationConfig, OptimizerConfig, ScheduleConfig
from scalegmn.train.trainer import TrainConfig, Trainer, backward_in_parts

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
    config = TrainConfig(device="cpu", **options)
    torch.manual_seed(config.seed)
    fabric = launch(config.device, config.devices, config.precision)
    return Trainer(fabric, task, OneNumber(), config, optimization, run)


def train(task, run, **options):
    trainer = build(task, run, **options)
    return trainer.model, trainer.fit()


def test_fits_and_writes_everything(run):
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
    assert (run.folder / "figures" / "learning_curves.png").stat().st_size > 1000


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
    found = backward_in_parts(loss, x, x[:, :2], 4)
    assert sizes == [10, 4, 4, 2]
    assert not found.requires_grad
    torch.testing.assert_close(found, whole.detach(), rtol=1e-12, atol=0)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-15)
