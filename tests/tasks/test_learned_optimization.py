"""Meta-training as a task: runs, resumption to the bit, processes, what finished runs give."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import scalegmn
from scalegmn.cli import main
from scalegmn.experiments.compare_optimizers import compare_optimizers, setting
from scalegmn.experiments.config import start_run
from scalegmn.experiments.optimizer_run import OptimizerRunConfig, read_optimizer_config, train_optimizer
from scalegmn.experiments.trained_optimizer import ModuleOptimizer
from scalegmn.optimizers.evaluation import learned_curves
from scalegmn.optimizers.learned import LearnedOptimizerConfig
from scalegmn.optimizers.problems import ImageData, InnerProblem, ProblemConfig
from scalegmn.tasks.learned_optimization import LearnedOptimization, MetaConfig
from scalegmn.training.checkpoint import read_tensors
from scalegmn.training.launch import launch
from scalegmn.training.trainer import Stopped, Trainer

WORDS = [
    *("--optimizer.network", "ff", "--optimizer.hidden_dim", "4", "--problem.image_size", "4"),
    *("--problem.hidden_dims", "[[4]]", "--problem.batch_size", "8", "--meta.networks", "3", "--meta.horizon", "4"),
    *("--meta.outer_steps", "3", "--meta.eval_networks", "2", "--train_args.num_epochs", "2"),
    *("--optimization.scheduler_args.warmup_steps", "0"),
]
CONFIGS = Path(__file__).parents[2] / "configs" / "l2o"
EVOLUTION = ["--meta.method", "evolution", "--meta.window", "2", "--meta.horizon", "4"]


def trained(folder, *words):
    train_optimizer(read_optimizer_config([*WORDS, *words, "--run_dir", str(folder)]))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("optimizer") / "run")


def test_a_run_is_like_every_run(run):
    summary = json.loads((run / "summary.json").read_text())
    assert {"test_loss", "test_accuracy", "val_loss", "best_epoch", "parameters"} <= set(summary)
    assert summary["data"]["task"] == "learned_optimization"
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert (run / "figures" / "learning_curves.png").exists()
    learned = scalegmn.load_optimizer(run).learned
    untrained = LearnedOptimizerConfig(network="ff", hidden_dim=4).build(learned.spec)
    assert learned.rule.log_rate != untrained.rule.log_rate


class StopsAt(LearnedOptimization):
    """Asks for a stop in an outer step, as a signal does."""

    signals = None
    count = 0

    def loss(self, model, inputs, target):
        self.count += 1
        if self.signals is not None and self.count == 4:
            self.signals.received = "SIGTERM"
        return super().loss(model, inputs, target)


@pytest.mark.parametrize("words", [[], EVOLUTION], ids=["first_order", "evolution"])
def test_a_stopped_run_goes_on_to_the_bit(words, tmp_path):
    whole = trained(tmp_path / "whole", *words)
    config = read_optimizer_config([*WORDS, *words, "--run_dir", str(tmp_path / "stopped")])
    task = StopsAt(config.problem, config.meta)
    torch.manual_seed(0)
    model = config.optimizer.build(task.spec)
    trainer = Trainer(launch("cpu", 1, "fp32"), task, model, config.train_args, config.optimization, start_run(config))
    task.signals = trainer.signals
    with pytest.raises(Stopped):
        trainer.fit()
    train_optimizer(read_optimizer_config(["--resume", str(tmp_path / "stopped")]).changed(run_dir=config.run_dir))
    for name in ("best", "last"):
        one, other = (
            read_tensors(tmp_path / run / "checkpoints" / f"{name}.safetensors") for run in ("whole", "stopped")
        )
        assert one[1] == other[1]
        assert all(torch.equal(one[0][key], other[0][key]) for key in one[0])
    assert whole.exists()


@pytest.mark.parametrize("method", ["first_order", "evolution"])
def test_shares_of_the_inner_networks_add_up(method):
    """As processes share them: the mean of the shares' gradients is that of the whole."""
    problem = ProblemConfig(image_size=4, hidden_dims=((4,),), batch_size=8)
    torch.manual_seed(0)
    meta = MetaConfig(method=method, networks=4, horizon=4, window=2)
    gradients = []
    for shares in ([slice(0, 4)], [slice(0, 2), slice(2, 4)]):
        task = LearnedOptimization(problem, meta)
        torch.manual_seed(0)
        model = LearnedOptimizerConfig(network="ff", hidden_dim=4).build(task.spec)
        inputs, target = next(task.train_batches([torch.arange(4)], torch.Generator().manual_seed(0), "cpu"))
        for share in shares:
            task.population = None
            (task.loss(model, inputs[share], target[share]) * len(target[share]) / 4).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


def test_module_optimizer_is_the_learned_one():
    """On a module, it takes the steps that it takes on the networks it was trained on; its state goes with it."""
    config = ProblemConfig(image_size=3, hidden_dims=((5,),), batch_size=16)
    problem = InnerProblem.draw(config, ImageData(config), 1, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    learned = LearnedOptimizerConfig(hidden_dim=4).build(problem.params.spec)
    with torch.no_grad():
        learned.rule.gains += 0.3
    expected = learned_curves(learned, problem, 4).parameters[0]
    module = nn.Sequential(nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 10))
    module = scalegmn.to_module(problem.params, module, torch.randn(1, 9))
    optimizer = ModuleOptimizer(learned, module, torch.randn(1, 9))
    for step in range(4):
        images, labels = problem.batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(images[0]), labels[0])
        loss.backward()
        if step == 2:
            state = optimizer.state_dict()
            optimizer = ModuleOptimizer(learned, module, torch.randn(1, 9))
            optimizer.load_state_dict(state)
        optimizer.step()
    found = torch.cat([parameter.flatten() for parameter in module.parameters()]).detach()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


class Normed(nn.Module):
    """A layer norm without parameters, and a layer without bias: places of the network that the module has not."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8, bias=False), nn.Linear(8, 3)
        self.norm = nn.LayerNorm(8, elementwise_affine=False)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))


def test_modules_of_any_architecture_learn():
    torch.manual_seed(0)
    spec = scalegmn.NetSpec((scalegmn.LayerSpec(2, 2, None, "relu"), scalegmn.LayerSpec(2, 2)))
    learned, x, y = LearnedOptimizerConfig(network="ff").build(spec), torch.randn(64, 6), torch.randint(3, (64,))
    module = Normed()
    optimizer, losses = ModuleOptimizer(learned, module, x), []
    for _ in range(100):

        def closure():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(module(x), y)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
    assert losses[-1] < 0.8 * losses[0]


def test_stored_states_are_not_rounded():
    torch.manual_seed(0)
    module, x = nn.Linear(3, 2).bfloat16(), torch.randn(8, 3, dtype=torch.bfloat16)
    learned = LearnedOptimizerConfig(network="ff").build(scalegmn.from_module(module, x).spec)
    optimizer, other = ModuleOptimizer(learned, module, x), ModuleOptimizer(learned, module, x)
    module(x).square().mean().backward()
    optimizer.step()
    stored = optimizer.state_dict()["state"][0]
    other.load_state_dict(optimizer.state_dict())
    taken = other.state_dict()["state"][0]
    assert stored["momenta"].dtype == torch.float32
    assert all(taken[name].dtype == value.dtype and torch.equal(taken[name], value) for name, value in stored.items())


def test_frozen_parameters_stay():
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(8, 3)
    module[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    optimizer = ModuleOptimizer(LearnedOptimizerConfig().build(scalegmn.from_module(module, x).spec), module, x)
    module(x).square().mean().backward()
    optimizer.step()
    changed = {name for name, tensor in module.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"0.bias", "2.weight", "2.bias"}


def test_modules_that_scalegmn_does_not_train_are_refused():
    x = torch.randn(8, 3)
    chain, normed = (nn.Sequential(nn.Linear(3, 4), *n, nn.ReLU(), nn.Linear(4, 2)) for n in ([], [nn.LayerNorm(4)]))
    learned = LearnedOptimizerConfig().build(scalegmn.from_module(chain, x).spec)
    with pytest.raises(ValueError, match=r"trains chains of layers without signs .* optimizer.network ff, mlp_lopt"):
        ModuleOptimizer(learned, normed, x)
    with pytest.raises(ValueError, match="trains one module, found further parameters"):
        ModuleOptimizer(learned, chain, x).add_param_group({"params": [nn.Parameter(x)]})


def test_comparison(run, tmp_path):
    text = compare_optimizers([run], 12, 2, ["unseen", "wider", "deeper", "longer", "digits"], tmp_path)
    assert re.search(r"unseen: 2 networks, 12 steps", text)
    assert re.search(r"longer: 2 networks, 60 steps", text)
    rows = json.loads((tmp_path / "optimizers.json").read_text())["wider"]
    assert [row["name"].partition(",")[0] for row in rows] == [
        *("SGD with momentum", "SGD with momentum", "Adam", "Adam", "ff"),
    ]
    assert rows[2]["steps"][0] is not None  # Adam gets where Adam gets
    assert all(row["losses"][0] > 0 and 0 <= row["accuracies"][0] <= 1 for row in rows)
    assert (tmp_path / "deeper.png").exists()
    problem = ProblemConfig(hidden_dims=((4,), (6, 5)))
    assert setting(problem, "wider").hidden_dims == ((8,), (12, 10))
    assert setting(problem, "deeper").hidden_dims == ((4, 4), (6, 5, 5))
    assert setting(replace(problem, images="folder", images_path="x"), "digits") == problem


def test_comparison_says_who_is_left_out(run, tmp_path):
    nfn = trained(tmp_path / "nfn", "--optimizer.network", "nfn")
    text = compare_optimizers([nfn, run], 6, 1, ["deeper"])
    assert re.search(r"^ff .*\nnfn is left out: the optimiser has maps for each layer of ", text, re.MULTILINE)


def test_seeds_share_a_row(run, tmp_path):
    trained(tmp_path / "ff", "--seeds", "0,1")
    other = trained(tmp_path / "other", "--optimizer.hidden_dim", "5")
    text = compare_optimizers([tmp_path / "ff", other], 6, 1, ["unseen"], tmp_path)
    *_, seeds, single = json.loads((tmp_path / "optimizers.json").read_text())["unseen"]
    alone = compare_optimizers([run], 6, 1, ["unseen"], tmp_path / "alone")
    assert "+-" in text
    assert "+-" not in alone
    assert (seeds["name"], single["name"]) == ("ff", f"ff ({other})")
    first = json.loads((tmp_path / "alone" / "optimizers.json").read_text())["unseen"][-1]
    assert seeds["losses"][0] == first["losses"][0] != seeds["losses"][1]
    assert len(seeds["steps"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer.network", "x"], "optimizer.network: found 'x', expected one of ff, mlp_lopt"),
        (["--optimizer.half_life", "0"], "optimizer.half_life: found 0.0, expected above 0, or null"),
        (
            ["--optimizer.half_life", "9", "--optimizer.rule", "ng"],
            "optimizer.half_life: found 9.0 with rule ng, expected rule adam, or null",
        ),
        (["--meta.horizon", "0"], "meta.horizon: found 0, expected at least 1"),
        (["--meta.method=evolution", "--meta.window=3"], "meta.horizon: found 4, expected a multiple of window, 3"),
        (["--train_args.precision", "bf16-mixed"], "train_args.precision: found bf16-mixed, expected auto or fp32"),
        (["--metta.horizon", "3"], "unknown key metta"),
        (
            ["--conf", "digits_cls/scalegmn.yml"],
            "give it to `scalegmn train TASK --conf`, TASK being classification, editing or generalization",
        ),
    ],
)
def test_wrong_settings(words, message, capsys):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_optimizer_config([*WORDS, *words])


def test_evolution_needs_one_architecture():
    problem = ProblemConfig(image_size=4, hidden_dims=((4,), (5,)))
    with pytest.raises(ValueError, match="found 2 architectures"):
        LearnedOptimization(problem, MetaConfig(method="evolution"))


def test_other_folders_are_no_optimizers(tmp_path):
    with pytest.raises(ValueError, match="is not the folder of a finished run of `scalegmn train optimizer`"):
        scalegmn.load_optimizer(tmp_path)
    (tmp_path / "net.pth").touch()
    for load in (scalegmn.load_optimizer, scalegmn.load):
        with pytest.raises(ValueError, match=r"net.pth is not the folder of a finished run.*\(it is a file\)"):
            load(tmp_path / "net.pth")


def test_configurations_are_read_back(tmp_path):
    config = read_optimizer_config(WORDS)
    (tmp_path / "config.yml").write_text(config.to_yaml())
    assert read_optimizer_config(["--conf", str(tmp_path / "config.yml")]) == config
    assert isinstance(config, OptimizerRunConfig)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yml")), ids=lambda path: path.stem)
def test_shipped_configurations(path, tmp_path):
    """They are read back as they are written, and take an outer step, here on digits."""
    config = read_optimizer_config(["--conf", str(path)])
    (tmp_path / "config.yml").write_text(config.to_yaml())
    assert read_optimizer_config(["--conf", str(tmp_path / "config.yml")]) == config
    problem = replace(config.problem, images="digits", images_path=None, batch_size=4)
    task = LearnedOptimization(problem, replace(config.meta, networks=2, horizon=2, window=2))
    model = config.optimizer.build(task.spec)
    inputs, target = next(task.train_batches([torch.arange(2)], torch.Generator().manual_seed(0), "cpu"))
    loss = task.loss(model, inputs, target)
    loss.backward()
    assert loss.isfinite()
    assert any(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def test_commands(run, capsys):
    main(["optimizers", str(run), "--steps", "6", "--networks", "1"])
    assert "steps to Adam's" in capsys.readouterr().out
