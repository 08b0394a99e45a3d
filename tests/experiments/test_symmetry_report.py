"""The symmetry report, on the published configurations."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from commands import assert_refused, run_command

from scalegmn.cli import main
from scalegmn.experiments.symmetry_report import report
from scalegmn.networks import BUILT_IN, LayerSpec, NetSpec
from scalegmn.nn.invariant import SignInvariant
from scalegmn.zoos.zoo_format import Networks, write_zoo

ROOT = Path(__file__).parents[2]


@pytest.fixture
def zoo(tmp_path, random_params):
    """zoo(activation): a zoo of 24 random networks, convolutional but for sines."""

    def make(activation):
        layers = (LayerSpec(1, 4, (3, 3), activation), LayerSpec(4, 5, (3, 3), activation), LayerSpec(5, 2))
        spec = NetSpec.mlp([2, 5, 4, 1], "sine", 30.0) if activation == "sine" else NetSpec(layers)
        own = [BUILT_IN.index(name) for name in ("relu", "tanh") * 12] if activation == "hetero" else None
        params = random_params(spec, 24, own).map(lambda tensor: tensor.float())
        splits = {"train": torch.arange(10), "val": torch.arange(10, 12), "test": torch.arange(12, 24)}
        write_zoo(tmp_path / activation, [Networks((params,), {"test_accuracy": torch.rand(24)})], splits, {})
        return str(tmp_path / activation)

    return make


def check(monkeypatch, capsys, conf, path, *words):
    """Exit code and lines of the report."""
    start = [
        "scalegmn",
        "symmetry",
        "--conf",
        str(ROOT / conf),
        "--data.dataset_path",
        path,
        "--scalegmn_args.hidden_dim",
        "8",
    ]
    monkeypatch.setattr(sys, "argv", [*start, *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code, capsys.readouterr().out.splitlines()


def lines(output, name):
    return [line for line in output if line.startswith(name)]


@pytest.mark.parametrize(
    ("conf", "activation", "symmetry"),
    [
        ("configs/cifar10/scalegmn_relu_bidir.yml", "relu", "scale"),
        ("configs/cifar10/scalegmn_hetero_bidir.yml", "hetero", "hetero"),
    ],
)
def test_published_bidirectional_configs_need_reciprocal(monkeypatch, capsys, zoo, conf, activation, symmetry):
    path = zoo(activation)
    code, output = check(monkeypatch, capsys, conf, path)
    assert code == 0, output
    assert "kept" in lines(output, symmetry)[0]
    code, output = check(monkeypatch, capsys, conf, path, "--scalegmn_args.reciprocal", "false")
    assert code == 1, output
    assert "BROKEN" in lines(output, symmetry)[0]
    assert "kept" in lines(output, "permutation")[0]


def test_hetero_models_are_judged_on_uniform_zoos_too(monkeypatch, capsys, zoo):
    path, conf = zoo("relu"), "configs/cifar10/scalegmn_hetero_bidir.yml"
    assert check(monkeypatch, capsys, conf, path)[0] == 0
    code, output = check(monkeypatch, capsys, conf, path, "--scalegmn_args.reciprocal", "false")
    assert code == 1
    assert "BROKEN" in lines(output, "scale")[0]


def test_phase_is_kept_by_canonical_networks_only(monkeypatch, capsys, zoo):
    path, conf = zoo("sine"), "configs/mnist_cls/scalegmn_bidir.yml"
    code, output = check(monkeypatch, capsys, conf, path)
    assert code == 0, output
    assert "kept" in lines(output, "phase")[0]
    assert float(lines(output, "control")[0].split()[3]) > 1e-3
    code, output = check(monkeypatch, capsys, conf, path, "--data.switch_to_canon", "false")
    assert code == 0  # no longer claimed
    assert lines(output, "phase")[0].split()[1] == "no"
    assert float(lines(output, "phase")[0].split()[3]) > 1e-3


def test_published_file(monkeypatch, capsys, zoo, tmp_path):
    published = json.loads((ROOT / "tests/fixtures/published_configs.json").read_text())[
        "cifar10/scalegmn_relu_bidir.yml"
    ]
    (tmp_path / "published.yml").write_text(yaml.safe_dump(published))
    code, output = check(monkeypatch, capsys, tmp_path / "published.yml", zoo("relu"))
    assert code == 0, output
    assert "kept" in lines(output, "scale")[0]


def test_report_sees_a_model_that_is_not_symmetric(random_params, generator):
    params = random_params(NetSpec.mlp([2, 5, 4, 1], "sine"), 8)
    errors = report(lambda p: p.flatten(), params, generator)
    assert set(errors) == {"permutation", "sign", "phase", "control"}
    assert min(errors.values()) > 0.1
    broken = report(lambda p: p.biases[-1] * (1 if p is params else float("nan")), params, generator)
    assert not any(error <= 1e-9 for error in broken.values())


@pytest.mark.parametrize("conf", ["scalegmn", "scalegmn_bidir"])
def test_editing_models_must_change_moved_networks_alike(monkeypatch, capsys, zoo, conf):
    path, conf = zoo("sine"), f"configs/mnist_editing/{conf}.yml"
    code, output = check(monkeypatch, capsys, conf, path)
    assert code == 0, output
    for name in ("permutation", "sign", "phase"):
        assert lines(output, name)[0].endswith("kept")
    assert float(lines(output, "control")[0].split()[3]) > 1e-3
    code, output = check(monkeypatch, capsys, conf, path, "--data.switch_to_canon", "false")
    assert code == 0
    assert lines(output, "phase")[0].split()[1] == "no"
    assert float(lines(output, "phase")[0].split()[3]) > 1e-3
    one_sign = lambda self, context, x: self.rho(x)  # noqa: E731
    monkeypatch.setattr(SignInvariant, "forward", one_sign)
    plain = ("--scalegmn_args.engine", "plain")  # the engine does not call it
    code, output = check(monkeypatch, capsys, conf, path, "--scalegmn_args.sign_map", "symmetrized", *plain)
    assert code == 1
    assert "BROKEN" in lines(output, "sign")[0]
    assert "kept" in lines(output, "permutation")[0]


@pytest.mark.parametrize(
    ("conf", "activation", "symmetry"),
    [
        ("configs/cifar10/scalegmn_relu_bidir.yml", "relu", "scale"),
        ("configs/cifar10/scalegmn_hetero_bidir.yml", "hetero", "hetero"),
    ],
)
@pytest.mark.parametrize("canonical", ["[]", "[scale]"])
def test_changes_of_every_kind_of_network(monkeypatch, capsys, zoo, conf, activation, symmetry, canonical):
    path = zoo(activation)
    words = ["--scalegmn_args.output", "parameters", "--data.canonicalize", canonical]
    code, output = check(monkeypatch, capsys, conf, path, *words)
    assert code == 0, output
    assert "kept" in lines(output, symmetry)[0]
    assert float(lines(output, "control")[0].split()[3]) > 1e-3
    code, output = check(monkeypatch, capsys, conf, path, *words, "--scalegmn_args.reciprocal", "false")
    assert code == (1 if canonical == "[]" else 0)


def test_changes_are_compared_as_changes_of_the_same_networks(random_params, generator):
    params = random_params(NetSpec.mlp([2, 5, 4, 1], "sine", 6.0), 8)

    def doubled(p):
        return p

    def shifted(p):
        return replace(p, biases=tuple(b + 1 for b in p.biases))

    errors = report(doubled, params, generator)
    assert errors["phase"] > 0.1  # biases are shifted, not multiplied
    assert max(errors["permutation"], errors["sign"]) < 1e-12
    errors = report(doubled, params, generator, ["phase"])
    assert max(errors["permutation"], errors["sign"], errors["phase"]) < 1e-12
    assert errors["control"] > 0.1
    assert report(shifted, params, generator)["sign"] > 0.1


def test_each_layers_changes_are_compared_with_their_own_spread(random_params, generator):
    params = random_params(NetSpec.mlp([2, 5, 4, 1], "sine", 6.0), 8)

    def hidden_weights_wrong(p):
        return replace(p, weights=(p.weights[0], 1e-12 * p.weights[1].abs(), p.weights[2]))

    errors = report(hidden_weights_wrong, params, generator)
    assert errors["sign"] > 0.1
    assert errors["permutation"] < 1e-12
    constant = report(lambda p: replace(p, biases=tuple(map(torch.zeros_like, p.biases))), params, generator)
    assert not any(error <= 1e-9 for error in constant.values())


@pytest.mark.parametrize(("model", "claimed"), [("ng_gnn", "yes"), ("statnn", "yes"), ("mlp", "no")])
def test_other_models_are_judged_by_what_they_claim(monkeypatch, capsys, zoo, tmp_path, model, claimed):
    settings = {"model": model, f"{model}_args": {"hidden_dim": 8}, "data": {"dataset_path": zoo("relu")}}
    (tmp_path / "conf.yml").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(
        sys, "argv", ["scalegmn", "symmetry", "--conf", str(tmp_path / "conf.yml"), "--data.switch_to_canon=false"]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    output = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0, output
    assert lines(output, "permutation")[0].split()[1] == claimed
    assert lines(output, "scale")[0].split()[1] == "no"


def check_modules(monkeypatch, capsys, tmp_path, name, shape, *options, **settings):
    """Exit code, lines and errors of the report on networks of a module of tests."""
    (tmp_path / "conf.yml").write_text(yaml.safe_dump(settings))
    words = ["--conf=conf.yml", f"--modules=factories:{name}", f"--input_shape={shape}", *options]
    code, output, error = run_command(["symmetry", *words], tmp_path, monkeypatch, capsys)
    return code, output.splitlines(), error


SMALL = {"hidden_dim": 4, "num_layers": 2}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("resnet", "1,3,8,8"),
        ("block", "1,3,8"),
        ("mixed", "1,3"),
        pytest.param("resnet18", "1,3,32,32", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("symmetry", ["permutation", "hetero"])
def test_modules_of_ones_own(monkeypatch, capsys, tmp_path, name, shape, symmetry):
    """A ResNet, a transformer's block, networks of two architectures."""
    settings = {"scalegmn_args": {**SMALL, "symmetry": symmetry, "direction": "bidirectional"}}
    code, output, error = check_modules(monkeypatch, capsys, tmp_path, name, shape, **settings)
    assert code == 0, (output, error)
    assert output[0].endswith("between 8 networks")
    assert lines(output, "permutation")[0].endswith("kept")
    assert lines(output, "scale")[0].endswith("kept") == (symmetry == "hetero")
    assert float(lines(output, "control")[0].split()[3]) > 1e-3
    assert output[-1] == "the model sees all parameters of the networks"


@pytest.mark.parametrize("model", ["scalegmn", "ng_gnn", "statnn"])
def test_modules_that_read_words(monkeypatch, capsys, tmp_path, model):
    scalegmn = {**SMALL, "symmetry": "permutation", "readout": "full_graph"}
    args = {"scalegmn": scalegmn, "ng_gnn": {**SMALL, "pooling": "mean"}, "statnn": {"hidden_dim": 8}}[model]
    settings = {"model": model, f"{model}_args": args}
    code, output, error = check_modules(monkeypatch, capsys, tmp_path, "bag", "2,5", "--words=9", **settings)
    assert code == 0, (output, error)
    assert lines(output, "permutation")[0].endswith("kept")
    assert output[-1] == "the model sees all parameters of the networks"


def test_bases_of_linear_networks(monkeypatch, capsys, tmp_path):
    settings = {"model": "mvprobe", "mvprobe_args": {"num_probes": 4, "projection_dim": 4}}
    code, output, error = check_modules(monkeypatch, capsys, tmp_path, "two_linears", "1,3", **settings)
    assert code == 0, (output, error)
    assert all(lines(output, name)[0].endswith("kept") for name in ("permutation", "scale", "basis"))
    assert float(lines(output, "control")[0].split()[3]) > 1e-3


def test_networks_of_one_layer_have_nothing_to_move(monkeypatch, capsys, tmp_path):
    code, output, error = check_modules(monkeypatch, capsys, tmp_path, "linear", "1,3", scalegmn_args=SMALL)
    assert code == 0, (output, error)
    assert lines(output, "permutation") == ["permutation          yes   0.0e+00   0.0e+00   kept"]
    assert output[-2] == "the networks have no hidden neurons: all elements, and the control, are the identity"
    assert output[-1] == "the model sees all parameters of the networks"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--modules=factories:resnet"], "--modules and --input_shape go together"),
        (["--modules=factories", "--input_shape=1,2"], "--modules: found factories, expected package.module:factory"),
        (["--modules=factories:resnet", "--input_shape=1,x"], "--input_shape: found 1,x, expected numbers"),
        (["--modules=factories:bag", "--input_shape=2,5"], "for an input of whole numbers below N set --words N"),
        (["--words=9"], "--words: is about networks of --modules"),
        (["--modules=factories:bag", "--input_shape=2,5", "--words=0"], "--words: found 0, expected at least 1"),
        (["--modules=factories:nothing", "--input_shape=1,2"], "factories:nothing: AttributeError"),
        (["--modules=factories:number", "--input_shape=1,2"], "factories:number: AttributeError"),
        (["--modules=factories:same", "--input_shape=1,2"], "--modules: factories:same makes the same network"),
        (["--modules=factories:resnet", "--input_shape=1,3,8,8", "--model=dwsnet"], "model: dwsnet reads chains"),
        (["--modules=factories:mixed", "--input_shape=1,3", "--model=nfn"], "model: nfn reads networks of one arch"),
    ],
)
def test_bad_modules(monkeypatch, capsys, tmp_path, words, message):
    assert_refused(run_command(["symmetry", *words], tmp_path, monkeypatch, capsys), message)
