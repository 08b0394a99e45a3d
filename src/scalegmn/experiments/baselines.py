"""Simple baselines beside a finished run, on the same networks: same zoo, same splits."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.quasirandom import SobolEngine

from scalegmn.experiments.config import read_config_file
from scalegmn.experiments.trained import load
from scalegmn.networks import NetParams
from scalegmn.networks.evaluate import evaluate
from scalegmn.symmetry.groups import GroupElement
from scalegmn.symmetry.statistics import invariant_statistics
from scalegmn.tasks.generalization import metrics
from scalegmn.tasks.zoo_task import DEBUG_NETWORKS
from scalegmn.zoos.loader import LabelledNets, load_splits

TREES, LEAVES, LEARNING_RATE = 600, 31, 0.05
"""Gradient boosting on histograms: the largest number of trees, leaves of each, and the learning rate."""

EPOCHS = 60
"""Of an MLP on statistics; the best one counts."""

BATCH = 256
"""Networks that the trained model reads at a time."""


def flattened(params: NetParams) -> NDArray:
    """All weights and biases, [B, parameters]."""
    return params.flatten().numpy()


def queried(params: NetParams, num_points: int) -> NDArray:
    """What the networks themselves compute at points spread evenly over [-1, 1]^n, [B, num_points * outputs]."""
    points = SobolEngine(params.spec.layout[0]).draw(num_points) * 2 - 1
    return evaluate(params, points.to(params.biases[0])).flatten(1).numpy()


def _logistic_regression() -> LogisticRegression:
    return LogisticRegression(max_iter=200)


def _mlp() -> MLPClassifier:
    return MLPClassifier((256, 128), max_iter=30, random_state=0)


CLASSIFIERS: dict[str, tuple[Callable[[NetParams], NDArray], Callable[[], Any]]] = {
    "weights, logistic regression": (flattened, _logistic_regression),
    "weights, MLP 256-128": (flattened, _mlp),
    "64 points, MLP 256-128": (partial(queried, num_points=64), _mlp),
    "256 points, MLP 256-128": (partial(queried, num_points=256), _mlp),
}
"""Name -> features of networks, and a classifier. Those of weights ignore the symmetries; those of points ask the
networks themselves, which must be MLPs."""


def flat_rows(run: Path) -> list[dict[str, Any]]:
    """A classification run, and `CLASSIFIERS` on the same networks: a row each.

    Each is tested twice: on the test networks, and on these networks after random permutations and rescalings of their
    neurons (`moved_accuracy`), which do not change what they compute. The classifiers read networks canonical or not,
    as in the run, each feature standardised on the training split.

    Raises:
        ValueError: the zoo is not the one that the run was trained on, or has several architectures.
    """
    model, summary, splits = _networks_of(run, "label")
    networks = {split: _all(nets) for split, nets in splits.items()}
    labels = {split: nets.labels.numpy() for split, nets in splits.items()}
    moved = _moved(networks["test"])
    trained = load(run)
    answers = [trained(moved[start : start + BATCH]) for start in range(0, len(moved), BATCH)]
    predicted = torch.cat([answer for answer in answers if isinstance(answer, Tensor)]).argmax(1)
    accuracy_moved = float((predicted.numpy() == labels["test"]).mean())
    columns = ("model", "test_accuracy", "moved_accuracy", "parameters", "seconds")
    rows = [(model, summary["test_accuracy"], accuracy_moved, summary["parameters"], summary["seconds"])]
    spec = networks["test"].spec
    for name, (features, build) in CLASSIFIERS.items():
        if features is not flattened and (spec.is_cnn or not spec.is_chain):
            continue
        started = time.perf_counter()
        estimator = build()
        classifier = make_pipeline(StandardScaler(), estimator)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            classifier.fit(features(networks["train"]), labels["train"])
        is_mlp = isinstance(estimator, MLPClassifier)
        arrays = estimator.coefs_ + estimator.intercepts_ if is_mlp else [estimator.coef_, estimator.intercept_]
        seconds = time.perf_counter() - started
        scores = [classifier.score(features(params), labels["test"]) for params in (networks["test"], moved)]
        rows.append((name, *scores, sum(array.size for array in arrays), seconds))
    return [dict(zip(columns, row, strict=True)) for row in rows]


def flat_baselines(run: Path) -> str:
    """The table of `flat_rows`, which are also appended to RUN/baselines.jsonl."""
    rows = flat_rows(run)
    _append(run, rows)
    num_networks = json.loads((run / "summary.json").read_text())["data"]["networks"]["test"]
    lines = [
        f"Test accuracy on {num_networks:,} networks of held-out images; moved: after random permutations and",
        "rescalings of their neurons, which do not change what they compute",
        "",
        f"{'model':<30}{'accuracy':>10}{'moved':>8}{'parameters':>12}{'seconds':>9}",
    ]
    for row in rows:
        shares = f"{row['test_accuracy']:>10.1%}{row['moved_accuracy']:>8.1%}"
        lines.append(f"{row['model']:<30}{shares}{row['parameters']:>12,}{row['seconds']:>9.0f}")
    return "\n".join(lines)


def statistics_rows(run: Path) -> list[dict[str, Any]]:
    """A generalisation run, and regressions on statistics of the weights (Unterthiner et al., 2020): a row each.

    Gradient boosting and an MLP, once on statistics of the weights as they are, and once on statistics that no
    permutation, sign or scale of neurons moves: what a function-invariant model can know. The number of trees, and the
    MLP's epoch, are `chosen` by tau on the validation split. `moved_tau`: of the test networks after random
    permutations and rescalings of their neurons.

    Raises:
        ValueError: the zoo is not the one that the run was trained on, or has several architectures.
    """
    model, summary, splits = _networks_of(run, "test_accuracy")
    networks = {name: _all(nets) for name, nets in splits.items()}
    targets = {name: nets.labels.double().numpy() for name, nets in splits.items()}
    networks["moved"], targets["moved"] = _moved(networks["test"]), targets["test"]
    own = {f"test_{name}": summary[f"test_{name}"] for name in ("tau", "r2", "mae")}
    rows = [{"model": model, **own, "parameters": summary["parameters"], "seconds": summary["seconds"]}]
    for kind, statistics_of in STATISTICS.items():
        features = {name: statistics_of(params) for name, params in networks.items()}
        rows += [_boosted(kind, features, targets), _perceptron(kind, features, targets)]
    return rows


def statistics_baselines(run: Path) -> str:
    """The table of `statistics_rows`, which are also appended to RUN/baselines.jsonl."""
    rows = statistics_rows(run)
    _append(run, rows)
    num_networks = json.loads((run / "summary.json").read_text())["data"]["networks"]["test"]
    lines = [f"Test accuracy of {num_networks:,} networks, predicted from their weights", ""]
    lines.append(f"{'model':<40}{'tau':>8}{'R^2':>8}{'MAE':>8}{'seconds':>9}")
    for row in rows:
        scores = "".join(f"{row[f'test_{name}']:>8.3f}" for name in ("tau", "r2", "mae"))
        name = ", ".join([row["model"], *([row["chosen"]] if "chosen" in row else [])])
        lines.append(f"{name:<40}{scores}{row['seconds']:>9.0f}")
    return "\n".join(lines)


def statistics(params: NetParams) -> NDArray:
    """Mean, variance and quantiles 0, 1/4, 1/2, 3/4, 1 of each layer's weights and of its biases.

    Returns:
        [B, 14 L]; for networks with an activation each [B, 14 L + 1], the activation's number first.
    """
    quantiles = torch.tensor([0, 0.25, 0.5, 0.75, 1])
    columns = [] if params.activation is None else [params.activation[:, None].float()]
    for tensor in (*params.weights, *params.biases):
        flat = tensor.flatten(1)
        columns += [flat.mean(1, keepdim=True), flat.var(1, correction=0, keepdim=True), flat.quantile(quantiles, 1).mT]
    return torch.cat(columns, 1).numpy()


def exact_statistics(params: NetParams) -> NDArray:
    """`invariant_statistics`, [B, numbers]."""
    layers, network = invariant_statistics(params)
    return torch.cat([layers.flatten(1), network], dim=1).numpy()


STATISTICS: dict[str, Callable[[NetParams], NDArray]] = {
    "statistics": statistics,
    "invariant statistics": exact_statistics,
}
"""Name -> features of networks, [B, numbers]."""


def _networks_of(run: Path, column: str) -> tuple[str, dict[str, Any], Mapping[str, LabelledNets]]:
    """The model's name, the summary and the labelled networks of each split of a finished run."""
    config = read_config_file(run / "config.yml")
    summary = json.loads((run / "summary.json").read_text())
    zoo, splits = load_splits(config.data, column, DEBUG_NETWORKS if config.debug else None)
    if zoo.sha256 != summary["data"]["sha256"]:
        raise ValueError(f"{zoo.path} is not the zoo that {run} was trained on; make it again")
    return config.model, summary, splits


def _all(nets: LabelledNets) -> NetParams:
    """All networks of a split.

    Raises:
        ValueError: they have several architectures.
    """
    params = nets.read(slice(None))
    if not isinstance(params, NetParams):
        raise ValueError(f"{nets.zoo.path}: the baselines read networks of one architecture, found several")
    return params


def _moved(params: NetParams) -> NetParams:
    """The networks after random permutations and rescalings of their neurons."""
    return GroupElement.sample(params, torch.Generator().manual_seed(0)).act(params)


def _boosted(kind: str, features: Mapping[str, NDArray], targets: Mapping[str, NDArray]) -> dict[str, Any]:
    """The row of gradient boosting, from features and targets per split."""
    started = time.perf_counter()
    model = HistGradientBoostingRegressor(
        max_iter=TREES,
        max_leaf_nodes=LEAVES,
        min_samples_leaf=min(20, 1 + len(targets["train"]) // 10),  # 20 of few networks allow no tree
        learning_rate=LEARNING_RATE,
        early_stopping=False,
        random_state=0,
    ).fit(features["train"], targets["train"])
    scores = [kendalltau(targets["val"], predicted).statistic for predicted in model.staged_predict(features["val"])]
    trees = int(np.nanargmax(scores)) + 1
    predicted = {split: list(model.staged_predict(features[split]))[trees - 1] for split in ("test", "moved")}
    row = _row(f"{kind}, boosting", predicted, targets, time.perf_counter() - started)
    return row | {"chosen": f"{trees} trees"}


def _perceptron(kind: str, features: Mapping[str, NDArray], targets: Mapping[str, NDArray]) -> dict[str, Any]:
    """The row of an MLP 256-256 on standardised features."""
    started = time.perf_counter()
    scaler = StandardScaler().fit(features["train"])
    model = MLPRegressor(hidden_layer_sizes=(256, 256), random_state=0)
    inputs = {split: scaler.transform(rows) for split, rows in features.items()}
    best, predicted, epochs = -np.inf, {split: targets[split] * 0 for split in ("test", "moved")}, 0
    for epoch in range(EPOCHS):
        model.partial_fit(inputs["train"], targets["train"])
        tau = kendalltau(targets["val"], model.predict(inputs["val"])).statistic
        if tau > best:
            best, epochs = tau, epoch + 1
            predicted = {split: model.predict(inputs[split]) for split in predicted}
    row = _row(f"{kind}, MLP", predicted, targets, time.perf_counter() - started)
    parameters = sum(array.size for array in model.coefs_ + model.intercepts_)
    return row | {"chosen": f"{epochs} epochs", "parameters": parameters}


def _row(name: str, predicted: Mapping[str, NDArray], targets: Mapping[str, NDArray], seconds: float) -> dict[str, Any]:
    """A row of `statistics_rows`, from predictions for the test networks, as they are and moved."""
    test, moved = (metrics(targets["test"], predicted[split].clip(0, 1)) for split in ("test", "moved"))
    scores = {f"test_{key}": test[key] for key in ("tau", "r2", "mae")}
    return {"model": name, **scores, "moved_tau": moved["tau"], "seconds": seconds}


def _append(run: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Adds the rows to RUN/baselines.jsonl."""
    with open(run / "baselines.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


ROWS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    "classification": flat_rows,
    "generalization": statistics_rows,
}
"""Task -> a finished run, and its baselines."""

BASELINES: dict[str, Callable[[Path], str]] = {
    "classification": flat_baselines,
    "generalization": statistics_baselines,
}
"""Task -> the table of a finished run beside its baselines."""
