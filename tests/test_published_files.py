"""Published configuration files, given to `--conf` as they are."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from scalegmn.configuration.parsing import parse
from scalegmn.experiments.config import Config, build_model, read_config, with_sections
from scalegmn.interop.published_configs import translate_file
from scalegmn.networks import NetSpec

ROOT = Path(__file__).parents[1]
FILES = json.loads((ROOT / "tests/fixtures/published_configs.json").read_text())
"""Name -> content of each published file."""


@pytest.fixture
def write(tmp_path):
    """write(content): a YAML file, as a word for `--conf`."""

    def make(content, name="published.yml"):
        (tmp_path / name).write_text(yaml.safe_dump(content))
        return str(tmp_path / name)

    return make


def changed(name, **values):
    """A published file with other values; `__` for dots, `...` to leave a key out."""
    content = copy.deepcopy(FILES[name])
    for key, value in values.items():
        *sections, last = key.split("__")
        section = content
        for part in sections:
            section = section[part]
        section[last] = value
        if value is ...:
            del section[last]
    return content


def error(arguments):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read_config(arguments)
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_published_files_say_what_ours_say(name, write, tmp_path, capsys):
    config = read_config(["--conf", write(FILES[name]), "--run_dir", "out"])
    ours = read_config(["--conf", str(ROOT / "configs" / name), "--run_dir", "out"])
    root, data = Path(ours.data.dataset_path), config.data
    assert Path(data.dataset_path) == root
    named = {"split_path": "*splits.json", "data_path": "weights.npy", "metrics_path": "metrics.csv.gz"}
    named |= {"layout_path": "layout.csv", "idcs_file": f"{ours.data.dataset}_split.csv"}
    for key, default in named.items():  # what our files leave to the default
        assert getattr(data, key) is None or Path(getattr(data, key)).match(str(root / default))
    spelled = {key: getattr(data, key) for key in ("dataset", "dataset_path", *named)}
    assert spelled["dataset"] in (ours.data.dataset, "cifar10")  # as published for svhn/scalegmn_tanh*.yml
    assert config == replace(ours, data=replace(ours.data, **spelled))
    (tmp_path / "config.yml").write_text(config.to_yaml())
    assert read_config(["--conf", str(tmp_path / "config.yml"), "--run_dir", "out"]) == config
    not_used, never_read = capsys.readouterr().err.splitlines()
    assert not_used.startswith(f"{tmp_path / 'published.yml'}: not used: ")
    assert {"data.layer_layout,"} <= set(not_used.split())
    assert "never" not in not_used
    assert "nor ever read by the published code: " in never_read
    assert "scalegmn_args.jit" in never_read


def test_our_files_are_left_alone():
    for path in ROOT.glob("configs/*/*.yml"):
        content = yaml.safe_load(path.read_text())
        assert translate_file(content) == (content, [])
    for content in ({"scalegmn_args": None}, {"scalegmn_args": 3}, {}):
        assert translate_file(content) == (content, [])


def test_precedence(write, capsys):
    first = write({"batch_size": 7, "scalegmn_args": {"hidden_dim": 16, "normalize": True}}, "first.yml")
    last = write({"scalegmn_args": {"num_layers": 3}}, "last.yml")
    published = write(FILES["fmnist_cls/scalegmn.yml"])
    files = ["--conf", first, "--conf", published, "--conf", last]
    config = read_config(["--scalegmn_args.hidden_dim", "64", *files, "--data.dataset_path", "data/digits_inr"])
    assert config.data.dataset_path == "data/digits_inr"
    assert config.batch_size == FILES["fmnist_cls/scalegmn.yml"]["batch_size"]
    model = config.model_config
    assert (model.hidden_dim, model.num_layers, model.normalize) == (64, 3, None)
    assert (model.mlp_dims, model.readout_dim) == (None, None)  # follow hidden_dim
    assert read_config([*files, "--conf", first]).model_config.hidden_dim == 16
    assert capsys.readouterr().err.count("first.yml") == 0
    assert read_config(["--conf", published, "--scalegmn_args.symmetry=permutation"]).model_config.normalize is None


def test_other_values(write):
    name = "mnist_cls/scalegmn.yml"
    given = {"optimization__clip_grad": False, "optimization__scheduler_args__scheduler": "None", "wandb": True}
    given |= {"train_args__seed": 3, "data__switch_to_canon": False, "scalegmn_args__mlp_args__d_k": [64, 64]}
    config = read_config(["--conf", write(changed(name, **given))])
    assert config.optimization.clip_grad_max_norm is None
    assert config.optimization.scheduler_args.warmup_steps == 0
    assert (config.wandb, config.train_args.seed, config.data.switch_to_canon) == (True, 3, False)
    assert config.model_config.mlp_dims == (128, 128)  # d_hid, as the published scripts overwrite it


def test_problems_are_named_together_with_the_file(write):
    given = {"optimisation": 3, "data__dataset_pth": "x", "scalegmn_args__gnn_args__agregator": "add"}
    given |= {"scalegmn_args__mlp_args__skip": True, "scalegmn_args__gnn_args__dropout": ...}
    given |= {"optimization__optimizer_name": "SGD", "optimization__scheduler_args__scheduler": "StepLR"}
    file = write(changed("mnist_cls/scalegmn.yml", **given))
    message = error(["--conf", file, "--batchsize", "3"])
    for part in (
        f"{file}: ",
        "optimisation: no published key",
        "data.dataset_pth: no published key, did you mean data.dataset_path?",
        "scalegmn_args.gnn_args.agregator: no published key, did you mean gnn_args.aggregator?",
        "scalegmn_args.gnn_args.dropout: is missing",
        "scalegmn_args.mlp_args.skip: True is not supported, only False",
        "optimization.optimizer_name: 'SGD' is not supported",
        "optimization.scheduler_args.scheduler: 'StepLR' is not supported",
        "command line: unknown key batchsize, did you mean batch_size?",
    ):
        assert part in message
    for given in ({"batch_size": "many"}, {"scalegmn_args__d_hid": "many"}, {"scalegmn_args__mlp_args__d_k": 128}):
        message = error(["--conf", write(changed("mnist_cls/scalegmn.yml", **given))])
        assert f"{file}: " in message
        assert "expected a whole number" in message or "a value has the wrong type" in message


def test_print_config_and_notebooks(write, capsys):
    file = write(FILES["cifar10/scalegmn_relu.yml"])
    with pytest.raises(SystemExit):
        read_config(["--conf", file, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["scalegmn_args"]["symmetry"] == "scale"
    model = build_model(file, ["scalegmn_args.hidden_dim=8"], NetSpec.mlp([2, 5, 1], "relu"))
    assert (model.config.symmetry, model.config.hidden_dim) == ("scale", 8)


def test_parsers_without_translation_refuse(write):
    with pytest.raises(ValueError, match=r"unknown key scalegmn_args.d_hid"):
        parse(Config, ["--conf", write(FILES["mnist_cls/scalegmn.yml"])], extend=with_sections)
