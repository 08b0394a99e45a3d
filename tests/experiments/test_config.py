import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from contract import flat

from scalegmn import build_model
from scalegmn.configuration.parsing import parse
from scalegmn.experiments.config import (
    Config,
    ScriptConfig,
    read_config,
    start_run,
    with_run_dir,
    with_sections,
)
from scalegmn.interop.adapters import adapter_spec
from scalegmn.models import METANETWORKS
from scalegmn.models.flat_mlp import FlatMLP
from scalegmn.networks import BUILT_IN, LayerSpec, NetSpec
from scalegmn.training.gradients import backward_in_micro_batches
from scalegmn.training.launch import launch
from scalegmn.training.optimization import build_optimizer
from scalegmn.training.precision import InPrecision
from scalegmn.zoos.fit.cnn_zoo import CnnRecipe
from scalegmn.zoos.fit.inr_zoo import InrRecipe

ROOT = Path(__file__).parents[2]
OTHERS = ("zoos", "sweeps", "compare", "l2o")
RUNS = sorted(path for path in ROOT.glob("configs/*/*.yml") if path.parent.name not in OTHERS)
DIGITS = ("digits_cls", "digits_cnn", "digits_editing")
"""Folders of configurations of the demos' zoos: all models."""
RECIPES = sorted(ROOT.glob("configs/zoos/*.yml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_config_round_trips_and_builds(path, tmp_path):
    config = read_config(["--conf", str(path)])
    (tmp_path / "config.yml").write_text(config.to_yaml())
    assert read_config(["--conf", str(tmp_path / "config.yml")]) == config
    assert list(yaml.safe_load(config.to_yaml()))[1:3] == ["model", f"{config.model}_args"]
    model = config.model_config.build(published_spec(config))
    assert sum(parameter.numel() for parameter in model.parameters()) > 1000


def published_spec(config):
    """The architecture of a configuration's zoo."""
    model = config.model_config
    if "lora" in config.data.dataset_path:
        return adapter_spec([(64, 4, 32), (32, 4, 64)])
    if "cnn" not in config.data.dataset_path and (model.out_dim != 1 or model.output == "parameters"):
        return NetSpec.mlp([2, 32, 32, 3 if "cifar" in config.data.dataset_path else 1], "sine")
    if "wild_park" in config.data.dataset_path:
        last, source = (
            ("hetero", None) if config.model == "scalegmn" else ("leaky_relu", 0)
        )  # so that it uses all branches
        layers = (LayerSpec(1 if "digits" in config.data.dataset_path else 3, 4, (7, 7), "gelu"),)
        layers += (LayerSpec(4, 8, (3, 3), "tanh"), LayerSpec(8, 4, (5, 5), last, residual=source))
        return NetSpec((*layers, LayerSpec(4, 10)))
    activation = config.data.activation_function or "hetero"
    hidden = (LayerSpec(i, 16, (3, 3), activation) for i in (1, 16, 16))
    return NetSpec((*hidden, LayerSpec(16, 10)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [path for path in RUNS if path.parent.name in DIGITS], ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_model_compiles_into_one_graph(path, random_params):
    """Which reads any number of networks."""
    config = read_config(["--conf", str(path)])
    spec = published_spec(config)
    own = [BUILT_IN.index(name) for name in ("relu", "tanh", "relu", "tanh", "relu")]
    params = random_params(spec, 5, own if "hetero" in spec.symmetries else None).map(torch.Tensor.float)
    model = config.model_config.build(spec).eval()
    batches = [params[:3], params]
    expected = [model(batch) for batch in batches]
    torch._dynamo.reset()
    model.compile(fullgraph=True, backend="aot_eager")
    called = InPrecision(model, launch("cpu", 1, "fp32"), compiled=True)
    found = [called(batches[0])]
    with torch._dynamo.config.patch(error_on_recompile=True):
        found.append(called(batches[1]))
    for output, same in zip(found, expected, strict=True):
        torch.testing.assert_close(flat(output), flat(same), rtol=1e-5, atol=1e-5)


def sized(path):
    """A configuration by its name; the published NFNs have up to 135 million parameters."""
    slow = path.stem == "nfn" and "digits" not in path.parent.name
    return pytest.param(path, id=f"{path.parent.name}-{path.stem}", marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize("path", map(sized, RUNS))
def test_every_config_takes_a_training_step(path, random_params):
    """At its full size, on networks of the published architecture."""
    config = read_config(["--conf", str(path)])
    spec = published_spec(config)
    own = [BUILT_IN.index(name) for name in ("relu", "tanh", "relu")] if "hetero" in spec.symmetries else None
    params = random_params(spec, 3, own).map(lambda tensor: tensor.float() / 4)
    torch.manual_seed(0)
    model = config.model_config.build(spec)
    model.fit_normalization([params])
    optimizer, _ = build_optimizer(config.optimization, model.parameters(), 10)
    before = torch.nn.utils.parameters_to_vector(model.parameters())

    def loss(part, _):
        output = model(part)
        if config.model_config.output == "parameters":
            return torch.stack([(change - 1).square().mean() for change in (*output.weights, *output.biases)]).mean()
        auxiliary = 0 if model.auxiliary_loss is None else model.auxiliary_loss
        return (output - 1).square().mean() + auxiliary

    value = backward_in_micro_batches(loss, params, torch.zeros(3), 2)
    optimizer.step()
    assert value.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    assert not torch.equal(torch.nn.utils.parameters_to_vector(model.parameters()), before)


def test_all_published_configs_are_there():
    names = {f"{path.parent.name}/{path.name}" for path in RUNS}
    pairs = [("mnist_cls", ""), ("fmnist_cls", ""), ("cifar_inr_cls", ""), ("cifar_inr_cls", "_aug")]
    pairs += [("mnist_editing", ""), ("cifar10", "_relu"), ("cifar10", "_tanh"), ("cifar10", "_hetero")]
    pairs += [("svhn", "_relu"), ("svhn", "_tanh")]
    models = ("ng_gnn", "ng_t", "probegen", "scalegmn", "statnn")
    assert names >= {f"{task}/{model}.yml" for task in ("wild_park", "digits_wild_park") for model in models}
    assert names >= {f"{task}/scalegmn{kind}{bidir}.yml" for task, kind in pairs for bidir in ("", "_bidir")}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_parses(path):
    recipe = CnnRecipe if "cnn" in path.stem or "wild_park" in path.stem else InrRecipe
    assert parse(recipe, ["--conf", str(path)]).out.startswith("data/")


@pytest.mark.parametrize("path", RUNS + RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_configs_hold_differences_and_reasons(path):
    assert path.read_text().startswith("#")


def test_defaults_are_the_published_mnist_model():
    config = read_config(["--conf", str(ROOT / "configs/mnist_cls/scalegmn_bidir.yml")])
    model = config.model_config
    assert (model.hidden_dim, model.num_layers, model.symmetry, model.readout) == (128, 4, "sign", None)
    assert (model.direction, model.dropout, model.skip_connections) == ("bidirectional", 0.2, False)
    assert model.message.positions
    assert model.update.positions
    assert not model.edge_positions
    assert config.optimization.optimizer_args.weight_decay == 1e-3
    assert (config.batch_size, config.optimization.scheduler_args.warmup_steps) == (128, 1000)


def test_published_command_line():
    words = "--data.switch_to_canon False --wandb True --scalegmn_args.symmetry=permutation --batch_size 64"
    words += " --train_args.seed 3 --optimization.optimizer_args.lr 1e-3 --debug True --run_dir out"
    config = read_config(["--conf", str(ROOT / "configs/mnist_cls/scalegmn_bidir.yml"), *words.split()])
    assert config.data.switch_to_canon is False
    assert config.wandb is True
    assert config.model_config.symmetry == "permutation"
    assert (config.batch_size, config.train_args.seed, config.optimization.optimizer_args.lr) == (64, 3, 1e-3)
    assert config.debug is True
    assert config.run_dir == "out"


def test_precedence(tmp_path):
    (tmp_path / "a.yml").write_text("batch_size: 1\nscalegmn_args:\n  hidden_dim: 11\n  num_layers: 2\n")
    (tmp_path / "b.yml").write_text("batch_size: 2\nscalegmn_args:\n  hidden_dim: 22\n")
    files = ["--conf", str(tmp_path / "a.yml"), f"--conf={tmp_path / 'b.yml'}"]
    config = read_config(files)
    assert (config.batch_size, config.model_config.hidden_dim, config.model_config.num_layers) == (2, 22, 2)
    # the command line wins wherever it stands
    assert read_config(["--batch_size", "3", *files]).batch_size == 3
    assert read_config([files[2], "--conf", str(tmp_path / "a.yml")]).batch_size == 1


def test_run_folder_is_named_after_the_config():
    arguments = ["--conf", str(ROOT / "configs/digits_cls/scalegmn.yml")]
    assert Path(with_run_dir(Config(), arguments).run_dir).parent == Path("runs/digits_cls-scalegmn")
    assert Path(with_run_dir(Config(), []).run_dir).parent == Path("runs/default")
    assert with_run_dir(Config(run_dir="own"), arguments).run_dir == "own"


def test_auto_finds_the_newest_unfinished_run_of_the_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config(resume="auto", batch_size=7)
    place = tmp_path / "runs" / "default"

    def found():
        return Path(with_run_dir(config, []).run_dir)

    assert found().name not in ("1", "2", "3", "4")
    for name, own, is_finished in (("1", config, 0), ("2", config, 0), ("3", Config(), 0), ("4", config, 1)):
        (place / name).mkdir(parents=True)
        (place / name / "config.yml").write_text(own.to_yaml())
        if is_finished:
            (place / name / "summary.json").write_text("{}")
    assert found() == Path("runs/default/2")
    moved = replace(config, train_args=replace(config.train_args, device="cpu", devices=2))
    assert with_run_dir(moved, []).run_dir == "runs/default/2"
    (place / "2" / "summary.json").write_text("{}")
    assert found() == Path("runs/default/1")
    (place / "1" / "summary.json").write_text("{}")
    assert not found().exists()
    assert with_run_dir(replace(config, run_dir="own"), []).run_dir == "own"


def test_run_to_go_on_with(tmp_path):
    with pytest.raises(ValueError, match=r"--resume: .*nothing is not the folder of a run"):
        read_config([f"--resume={tmp_path / 'nothing'}"])
    (tmp_path / "config.yml").write_text(Config(batch_size=7).to_yaml())
    config = with_run_dir(read_config([f"--resume={tmp_path}"]))
    assert (config.batch_size, config.run_dir) == (7, str(tmp_path))
    with pytest.raises(ValueError, match="leave out --run_dir"):
        with_run_dir(replace(config, run_dir="elsewhere"))
    with pytest.raises(ValueError, match="resume: seeds go on where they stopped without it; give their --run_dir"):
        ScriptConfig(seeds="0,1", resume="auto")


@pytest.mark.parametrize("text", ["a: [1\n b: {", "- 1\n", b"\xff\xfe\xff"])
def test_damaged_configuration_of_a_run_to_go_on_with(tmp_path, text):
    (tmp_path / "config.yml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"config.yml: (not YAML|found a list)"):
        start_run(Config(run_dir=str(tmp_path), resume="auto"))


def test_scientific_numbers_without_a_dot(tmp_path):
    (tmp_path / "a.yml").write_text("optimization:\n  optimizer_args:\n    lr: 1e-4\n")
    assert read_config(["--conf", str(tmp_path / "a.yml")]).optimization.optimizer_args.lr == 1e-4


def error(arguments):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_config(arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_keys_are_named_together_with_the_nearest(tmp_path):
    file = tmp_path / "a.yml"
    file.write_text("batchsize: 3\nscalegmn_args:\n  symetry: sign\n  message:\n    io: same\nhidden_dim: 3\n")
    message = error(["--conf", str(file), "--scalegmn_args.num_layer", "2", "--wandbb=True"])
    for bad, good in {
        "batchsize": "batch_size",
        "scalegmn_args.symetry": "scalegmn_args.symmetry",
        "hidden_dim": "scalegmn_args.hidden_dim",
        "scalegmn_args.num_layer": "scalegmn_args.num_layers",
        "wandbb": "wandb",
    }.items():
        assert f"unknown key {bad}, did you mean {good}?" in message
    assert "command line: unknown key wandbb" in message
    assert f"{file}: unknown key batchsize" in message


def test_wrong_values_are_named_together(tmp_path):
    file = tmp_path / "a.yml"
    file.write_text("batch_size: many\nscalegmn_args:\n  symmetry: signs\n")
    message = error(["--conf", str(file), "--wandb", "maybe", "--train_args.seed=x"])
    for part in ("batch_size", "many", "scalegmn_args.symmetry", "signs", "permutation, sign", "wandb", "maybe"):
        assert part in message
    assert message.count("command line:") == 2


def test_contradictions_and_ranges():
    assert "update.positions: needs node_positions" in error(
        ["--scalegmn_args.node_positions", "none", "--scalegmn_args.update.positions", "true"]
    )
    net = ["--scalegmn_args.node_positions", "net"]
    assert "position_net.io: mlp is not equivariant on edges" in error([*net, "--scalegmn_args.position_net.io", "mlp"])
    assert "position_net.positions: found False" in error([*net, "--scalegmn_args.position_net.positions", "false"])
    assert "hetero reads no P; use product_sum" in error([*net, "--scalegmn_args.symmetry", "hetero"])
    sine = ["--scalegmn_args.update_rule", "sine_cat"]
    for symmetry in ("scale", "hetero", "permutation"):
        assert "update_rule: sine_cat is only" in error([*sine, "--scalegmn_args.symmetry", symmetry])
    words = ["position_map", "shared", "node_positions", "none", "edge_positions", "false"]
    message = error([f"--scalegmn_args.{key}={value}" for key, value in zip(words[::2], words[1::2], strict=True)])
    assert "position_map: needs node_positions or edge_positions" in message
    assert "batch_size: found 0, expected at least 1" in error(["--batch_size", "0"])
    assert "num_epochs: found 0" in error(["--train_args.num_epochs", "0"])
    assert "lr: found -1" in error(["--optimization.optimizer_args.lr=-1"])


def test_section_where_a_value_was_found(tmp_path):
    (tmp_path / "a.yml").write_text("data: digits\n")
    assert "data is a section of keys, found 'digits'" in error(["--conf", str(tmp_path / "a.yml")])


def test_files_that_are_no_settings(tmp_path):
    (tmp_path / "list.yml").write_text("- 1\n")
    (tmp_path / "broken.yml").write_text("a: [1\n")
    assert "found a list" in error(["--conf", str(tmp_path / "list.yml")])
    assert "not YAML" in error(["--conf", str(tmp_path / "broken.yml")])
    assert "no such file" in error(["--conf", str(tmp_path / "missing.yml")])
    assert "expected a YAML file" in error(["--conf"])
    here = os.getcwd()
    os.chdir(ROOT)
    try:
        assert "did you mean configs/mnist_cls/scalegmn.yml?" in error(["--conf", "configs/mnist_cls/scalegm.yml"])
    finally:
        os.chdir(here)


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_explains_every_field(word, capsys):
    with pytest.raises(SystemExit) as stop:
        read_config([word])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    content = asdict(with_sections(Config)())
    del content["model_config"], content["imports"]  # no options
    for leaf, _ in leaves(content):
        described = text.split(f"--{leaf} ", 2)[-1][:400]
        assert "(type:" in described, leaf
        words = described.split("(type:")[0].split()
        assert len(words) > 2, (leaf, words)


def leaves(content, prefix=""):
    for key, value in content.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_print_config(capsys):
    path = str(ROOT / "configs/digits_cls/scalegmn.yml")
    with pytest.raises(SystemExit) as stop:
        read_config(["--batch_size", "7", "--conf", path, "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["batch_size"] == 7
    assert printed["scalegmn_args"]["hidden_dim"] == 32
    assert {"classification_args", "improvement_args"} <= {*printed}
    assert "ng_gnn_args" not in printed  # the model is another


def test_models_are_chosen_by_name(tmp_path):
    for name, section in METANETWORKS.items():
        config = read_config(["--model", name])
        assert (config.model, config.model_config) == (name, section())
        assert section().section in with_sections(Config).__dataclass_fields__
        (tmp_path / f"{name}.yml").write_text(config.to_yaml())
        assert read_config(["--conf", str(tmp_path / f"{name}.yml")]) == config == Config(model_config=section())
    assert "scalegmn_args: the model is mlp; set model: scalegmn, or remove" in error(
        ["--model", "mlp", "--scalegmn_args.hidden_dim", "3"]
    )
    assert "scalegmn" in error(["--model", "mpl"])
    with pytest.raises(ValueError, match="model: found 'mpl', expected one of scalegmn, "):
        read_config(["--model", "mpl"])


def test_build_model(tmp_path):
    conf = ROOT / "configs/mnist_cls/scalegmn_bidir.yml"
    spec = NetSpec.mlp([2, 6, 6, 1], "sine")
    model = build_model(conf, ["scalegmn_args.symmetry=permutation", "--scalegmn_args.hidden_dim=8"], spec)
    assert (model.config.symmetry, model.config.hidden_dim) == ("permutation", 8)
    config = read_config(["--conf", str(conf)])
    assert build_model(config, spec=spec).config == config.model_config.with_readout(spec)
    (tmp_path / "mlp.yml").write_text("model: mlp\n")
    assert isinstance(build_model(tmp_path / "mlp.yml", spec=spec), FlatMLP)
    with pytest.raises(ValueError, match="no folders mnist_png_training"):
        build_model(conf, [f"data.dataset_path={tmp_path}"])
    with pytest.raises(ValueError, match="overrides"):
        build_model(config, ["batch_size=3"], spec)


def test_nearest_key_is_found_by_its_last_part():
    assert "optimization.optimizer_args.lr" in error(["--optimizer.lr", "3"])


def test_null_only_where_it_means_something(tmp_path):
    (tmp_path / "a.yml").write_text("batch_size:\ntrain_args:\n  patience: null\nrun_dir: null\ndata:\n")
    message = error(["--conf", str(tmp_path / "a.yml"), "--scalegmn_args.mlp_dims", "null", "--wandb=null"])
    assert message.count("found null") == 3
    assert "train_args.patience: found null" in message
    assert "data is a section of keys, found None" in message


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_empty_file_is_refused(tmp_path, text):
    (tmp_path / "a.yml").write_text(text)
    assert "a.yml: found no settings, expected keys and values; leave it out" in error(
        ["--conf", str(tmp_path / "a.yml")]
    )


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize(("name", "text"), [("a.yml", "batch_size: 7\n"), ("a.json", '{"batch_size": 7}')])
def test_files_of_windows(tmp_path, encoding, name, text):
    (tmp_path / name).write_text(text, encoding=encoding)
    assert read_config(["--conf", str(tmp_path / name)]).batch_size == 7


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("batch_size: many", "batch_size: found many, expected a whole number"),
        ("batch_size: 2.5", "batch_size: found 2.5, expected a whole number"),
        ("wandb: maybe", "wandb: found maybe, expected true or false"),
        ("run_dir: [1]", "run_dir: found [1], expected a text or null"),
        (
            "data: {split_points: 3}",
            "data.split_points: found 3, expected a list of 2, each a whole number, such as [16, 32]",
        ),
        (
            "data: {canonicalize: [fase]}",
            'data.canonicalize: found ["fase"], expected a list, each one of phase, scale, even_scale, such as',
        ),
        ("data: {dataset_args: 3}", "data.dataset_args: found 3, expected keys and values"),
        ("data: {extra_aug: null}", "data.extra_aug: found null, expected a whole number"),
        ("optimization: {optimizer_args: {lr: '0,01'}}", "lr: found 0,01, expected a number, did you mean 0.01?"),
        ("scalegmn_args: {symmetry: sgin}", "scalegmn_args.symmetry: found sgin, expected one of"),
    ],
)
def test_wrong_types_are_explained(tmp_path, setting, message):
    file = tmp_path / "a.yml"
    file.write_text(setting)
    assert f"{file}: " in error(["--conf", str(file)])
    assert message in error(["--conf", str(file)])


def test_a_missing_value_is_named():
    assert error(["--batch_size"]) == "command line: batch_size: found nothing after it, expected a whole number"


@pytest.mark.parametrize("seeds", ["1,1", "0,1,00"])
def test_seeds_differ(seeds):
    with pytest.raises(ValueError, match=f"seeds: found {seeds}, expected different numbers"):
        read_config(["--seeds", seeds], ScriptConfig)


def test_all_kinds_of_problems_in_one_message():
    words = ["--batchsize", "3", "--wandb", "maybe", "--train_args.seed=x"]
    assert error(words).count(";") == 2
    words = [
        "--batch_size=0",
        "--train_args.num_epochs=0",
        "--scalegmn_args.dropout",
        "2",
        "--optimization.optimizer_args.lr",
    ]
    message = error([*words, "-1e-3"])
    for part in ("batch_size: found 0", "num_epochs: found 0", "dropout: found 2", "lr: found -0.001"):
        assert part in message


def test_problems_win_over_print_config():
    assert "batch_size" in error(["--batch_size", "many", "--print_config"])
    assert "batch_size" in error(["--batch_size", "0", "--print_config"])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimization.scheduler_args.warmup_steps", "-3"),
        ("optimization.clip_grad_max_norm", "-1"),
        ("optimization.optimizer_args.weight_decay", "-1"),
        ("optimization.optimizer_args.lr", "0"),
        ("optimization.scheduler_args.plateau_patience", "0"),
        ("optimization.ema_decay", "1"),
        ("train_args.devices", "0"),
        ("train_args.checkpoint_minutes", "-1"),
    ],
)
def test_ranges(key, value):
    assert f"{key}: found" in error([f"--{key}", value])
