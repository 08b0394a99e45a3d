import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from sklearn.metrics import mean_absolute_error, r2_score

from scalegmn.models.scalegmn import ScaleGMNConfig
from scalegmn.models.statnn import StatNNConfig
from scalegmn.networks import BUILT_IN, LayerSpec, NetSpec
from scalegmn.symmetry.groups import GroupElement
from scalegmn.tasks.generalization import Generalization, metrics, weight_sizes
from scalegmn.zoos.loader import DataConfig
from scalegmn.zoos.zoo_format import Networks, write_zoo

MODEL = ScaleGMNConfig(symmetry="hetero", hidden_dim=4, num_layers=2, out_dim=1)


def test_metrics_by_hand():
    found = metrics(np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.1, 0.3, 0.2, 0.4]))
    assert found == pytest.approx({"tau": (5 - 1) / 6, "r2": 1 - 0.02 / 0.05, "mae": 0.05})
    ties = metrics(np.array([0.1, 0.2, 0.2]), np.array([0.3, 0.5, 0.7]))
    assert ties["tau"] == pytest.approx(2 / math.sqrt(2 * 3))  # tau-b: one pair is tied in the truth
    assert metrics(np.array([0.1, 0.2]), np.array([0.2, 0.1]))["tau"] == pytest.approx(-1)


def test_metrics_that_are_not_defined():
    assert metrics(np.array([0.1, 0.2]), np.array([0.5, 0.5]))["tau"] == 0
    assert metrics(np.array([0.3, 0.3]), np.array([0.1, 0.5])) == pytest.approx({"tau": 0, "r2": 0, "mae": 0.2})


def test_metrics_equal_scipy_and_sklearn():
    rng = np.random.default_rng(0)
    true = rng.random(200).round(1)
    predicted = (true + rng.random(200)) / 2
    found = metrics(true, predicted)
    assert found["tau"] == kendalltau(true, predicted).statistic
    assert found["r2"] == pytest.approx(r2_score(true, predicted))
    assert found["mae"] == pytest.approx(mean_absolute_error(true, predicted))


@pytest.fixture
def data(tmp_path, random_params, cnn_spec):
    """Fifty CNNs, relu and tanh in turn, ten each to validate and test."""
    own = [BUILT_IN.index(name) for name in ("relu", "tanh")] * 25
    params = random_params(cnn_spec.with_activation("hetero"), 50, own).to(torch.float32)
    splits = {"train": torch.arange(30), "val": torch.arange(30, 40), "test": torch.arange(40, 50)}
    columns = {"test_accuracy": torch.arange(50) / 50}
    write_zoo(tmp_path / "zoo", [Networks((params,), columns)], splits, {})
    return DataConfig(str(tmp_path / "zoo"))


def predicted(model, task, split):
    with torch.no_grad():
        return model.eval()(task.splits[split].read(slice(None)))[:, 0].double()


@pytest.mark.parametrize("loss", ["MSE", "BCE"])
def test_evaluation_is_over_the_whole_split(data, loss, tmp_path, drawn):
    task = Generalization(data, 4, loss)
    assert task.steps_per_epoch == 8
    torch.manual_seed(0)
    model = MODEL.build(task.spec)
    found = task.evaluate(model, "test", torch.device("cpu"), tmp_path)
    f, y = predicted(model, task, "test").sigmoid().numpy(), np.arange(40, 50) / 50
    for name, own in {"": slice(None), "_relu": slice(0, 10, 2), "_tanh": slice(1, 10, 2)}.items():
        assert found[f"tau{name}"] == pytest.approx(kendalltau(y[own], f[own]).statistic)
        assert found[f"r2{name}"] == pytest.approx(r2_score(y[own], f[own]), rel=1e-4)
        assert found[f"mae{name}"] == pytest.approx(mean_absolute_error(y[own], f[own]), rel=1e-5)
    by_hand = (f - y) ** 2 if loss == "MSE" else -(y * np.log(f) + (1 - y) * np.log(1 - f))
    assert found["loss"] == pytest.approx(by_hand.mean(), rel=1e-4)
    assert set(task.evaluate(model, "val", torch.device("cpu"))) == {"loss", "tau", "r2", "mae"}
    scatter = drawn["predictions.png"].axes[0]
    points = {dots.get_label(): np.asarray(dots.get_offsets()) for dots in scatter.collections}
    for name, first in (("relu", 0), ("tanh", 1)):
        np.testing.assert_allclose(points[name], np.stack([y, f], axis=1)[first::2], rtol=1e-5)


def test_loss_of_a_batch(data):
    task = Generalization(data, 30)
    model = MODEL.build(task.spec)
    params, target = next(task.train_batches([torch.arange(30)], torch.Generator(), torch.device("cpu")))
    loss = task.loss(model, params, target)
    expected = (model(params)[:, 0].sigmoid() - target).square().mean()
    torch.testing.assert_close(loss, expected)
    assert loss.requires_grad


@pytest.mark.parametrize(("name", "first"), [("relu", 0), ("tanh", 1)])
def test_networks_of_one_activation(data, name, first):
    """Those networks alone, in their splits, with their accuracies; the architecture is then theirs."""
    task, mixed = Generalization(replace(data, activation_function=name), 4), Generalization(data, 4)
    assert {layer.activation for layer in task.spec.layers[:-1]} == {name}
    for split, (start, end) in {"train": (0, 30), "val": (30, 40), "test": (40, 50)}.items():
        rows = torch.arange(start + first, end, 2)
        torch.testing.assert_close(task.splits[split].labels, rows / 50)
        read = task.splits[split].read(slice(None))
        assert read.activation is None
        assert torch.equal(read.flatten(), mixed.zoo.params[rows].flatten())
    symmetry, other = ("scale", "sign") if name == "relu" else ("sign", "scale")
    replace(MODEL, symmetry=symmetry).build(task.spec)
    with pytest.raises(ValueError, match=f"scalegmn_args.symmetry: {other} does not hold .* use {symmetry}"):
        replace(MODEL, symmetry=other).build(task.spec)
    with pytest.raises(ValueError, match=r"sign does not hold .* use hetero"):
        replace(MODEL, symmetry="sign").build(mixed.spec)


def test_activations_that_are_not_there(data, tmp_path):
    with pytest.raises(ValueError, match=r"data.activation_function: found gelu, expected one of relu, tanh as in"):
        Generalization(replace(data, activation_function="gelu"), 4)
    zoo = Generalization(replace(data, activation_function="relu"), 4).zoo
    write_zoo(tmp_path / "relu", [Networks(zoo.nets, zoo.columns)], zoo.splits, {})
    uniform = replace(data, dataset_path=str(tmp_path / "relu"))
    assert len(Generalization(replace(uniform, activation_function="relu"), 4).zoo) == 25
    with pytest.raises(ValueError, match=r"data.activation_function: found tanh, expected one of relu as in"):
        Generalization(replace(uniform, activation_function="tanh"), 4)


def test_accuracies_that_are_none(data, tmp_path):
    zoo = Generalization(data, 4).zoo
    write_zoo(tmp_path / "percent", [Networks(zoo.nets, {"test_accuracy": torch.arange(50)})], zoo.splits, {})
    with pytest.raises(ValueError, match=r"test_accuracy: found 0 to 49, expected 0 to 1"):
        Generalization(replace(data, dataset_path=str(tmp_path / "percent")), 4)


def test_identity_says_what_training_networks_are_like(data):
    found = Generalization(data, 4).identity()
    assert found["test_accuracy"][::50] == pytest.approx([0, 0.29, 0.58])
    assert len(found["log10_weights"]) == 4
    assert all(low < high for low, high in found["log10_weights"])


def test_weight_sizes_are_of_the_function(random_params, cnn_spec, generator):
    own = [BUILT_IN.index(name) for name in ("relu", "relu", "tanh", "tanh")]
    params = random_params(cnn_spec.with_activation("hetero"), 4, own)
    moved = GroupElement.sample(params, generator, decades=2.0).act(params)
    torch.testing.assert_close(weight_sizes(moved), weight_sizes(params))
    torch.testing.assert_close(weight_sizes(params)[3, 2], params.weights[2][3].square().mean().sqrt().log10())


def test_networks_of_several_architectures(tmp_path, random_params):
    """Metrics of each activation, sizes of weights layer by layer, with the last layers together."""
    first, second = LayerSpec(1, 4, (3, 3), "relu"), LayerSpec(4, 4, (3, 3), "tanh")
    deep = random_params(NetSpec((first, second, LayerSpec(4, 2))), 12)  # has several activations
    flat = random_params(NetSpec((replace(first, activation="tanh"), LayerSpec(4, 2))), 12).map(lambda t: 100 * t)
    test_only = random_params(NetSpec((first, second, second, LayerSpec(4, 2))), 2)
    rows = torch.tensor([20, 1, 13, 2, 0, 12, 3, 14, 4, 5, 15, 16, 6, 17, 7, 18, 8, 19, 9, 21, 10, 22, 11, 23, 24, 25])
    splits = dict(zip(("train", "val", "test"), rows.split([12, 4, 10]), strict=True))
    columns = {"test_accuracy": torch.arange(26) / 26}
    write_zoo(tmp_path / "zoo", [Networks((deep, flat, test_only), columns)], splits, {})
    task = Generalization(DataConfig(str(tmp_path / "zoo")), 4)
    model = StatNNConfig(hidden_dim=4, out_dim=1).build_for(task.architectures).double().eval()
    (tmp_path / "figures").mkdir()
    found = task.evaluate(model, "test", torch.device("cpu"), tmp_path / "figures")
    with torch.no_grad():  # one by one, as the zoo numbers them
        parts = {**{k: deep[k : k + 1] for k in range(12)}, **{k + 12: flat[k : k + 1] for k in range(12)}}
        parts |= {k + 24: test_only[k : k + 1] for k in range(2)}
        f = {k: model(parts[k])[0, 0].sigmoid().item() for k in splits["test"].tolist()}
    for name, own in {"": range(26), "_tanh": range(12, 24), "_several": [*range(12), 24, 25]}.items():
        chosen = sorted(set(own) & set(f))
        expected = np.abs(np.array([f[k] for k in chosen]) - np.array(chosen) / 26).mean()
        assert found[f"mae{name}"] == pytest.approx(expected, rel=1e-5)
    sizes = task.identity()["log10_weights"]
    assert sizes[2] is None  # hidden layers that only test networks have
    train = splits["train"]
    of_deep, of_flat = (
        weight_sizes(nets[own]).numpy() for nets, own in ((deep, train[train < 12]), (flat, train[train > 11] - 12))
    )
    assert sizes[1] == pytest.approx([of_deep[:, 1].min(), of_deep[:, 1].max()])
    for layer in (0, -1):
        both = np.concatenate([of_deep[:, layer], of_flat[:, layer]])
        assert sizes[layer] == pytest.approx([both.min(), both.max()])
