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
from sklearn.ensemble import GradientBoostingRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
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

TREES, DEPTH, LEARNING_RATE = 500, 5, 0.05
"""Gradient boosting: the largest number of trees, their depth, and the learning rate."""

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


def flat_baselines(run: Path) -> str:
    """The table of a classification run beside `CLASSIFIERS`, which is also appended to RUN/baselines.jsonl.

    Each is tested twice: on the test networks, and on these networks after random permutations and rescalings of their
    neurons, which do not change what they compute. The classifiers read networks canonical or not, as in the run, each
    feature standardised on the training split.

    Raises:
        ValueError: the zoo is not the one that the run was trained on.
    """
    name, summary, splits = _networks_of(run, "label")
    networks = {split: _all(nets) for split, nets in splits.items()}
    labels = {split: nets.labels.numpy() for split, nets in splits.items()}
    element = GroupElement.sample(networks["test"], torch.Generator().manual_seed(0))
    moved = element.act(networks["test"])
    trained = load(run)
    answers = [trained(moved[start : start + BATCH]) for start in range(0, len(moved), BATCH)]
    predicted = torch.cat([answer for answer in answers if isinstance(answer, Tensor)]).argmax(1)
    accuracy_moved = float((predicted.numpy() == labels["test"]).mean())
    rows = [(name, summary["test_accuracy"], accuracy_moved, summary["parameters"], summary["seconds"])]
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
    _append(run, ("model", "test_accuracy", "moved_accuracy", "parameters", "seconds"), rows)
    lines = [
        f"Test accuracy on {len(labels['test']):,} networks of held-out images; moved: after random permutations and"
    ]
    lines += ["rescalings of their neurons, which do not change what they compute", ""]
    lines.append(f"{'model':<30}{'accuracy':>10}{'moved':>8}{'parameters':>12}{'seconds':>9}")
    for name, accuracy, accuracy_moved, parameters, seconds in rows:
        lines.append(f"{name:<30}{accuracy:>10.1%}{accuracy_moved:>8.1%}{parameters:>12,}{seconds:>9.0f}")
    return "\n".join(lines)


def statistics_baselines(run: Path) -> str:
    """The table of a generalisation run beside gradient boosting on statistics of the weights (Unterthiner et al.,
    2020), which is also appended to RUN/baselines.jsonl.

    Once of the weights as they are, and once of statistics that no permutation, sign or scale of neurons moves: what a
    function-invariant model can know. The number of trees is chosen by tau on the validation split.

    Raises:
        ValueError: the zoo is not the one that the run was trained on.
    """
    model, summary, splits = _networks_of(run, "test_accuracy")
    networks = {name: _all(nets) for name, nets in splits.items()}
    targets = {name: nets.labels.double().numpy() for name, nets in splits.items()}
    rows = [(model, *(summary[f"test_{name}"] for name in ("tau", "r2", "mae")), summary["seconds"])]
    for kind, statistics_of in STATISTICS.items():
        features = {name: statistics_of(params) for name, params in networks.items()}
        rows.append(_boosted(kind, features, targets))
    _append(run, ("model", "test_tau", "test_r2", "test_mae", "seconds"), rows)
    lines = [f"Test accuracy of {len(targets['test']):,} networks, predicted from their weights", ""]
    lines.append(f"{'model':<24}{'tau':>8}{'R^2':>8}{'MAE':>8}{'seconds':>9}")
    for name, tau, r2, mae, seconds in rows:
        lines.append(f"{name:<24}{tau:>8.3f}{r2:>8.3f}{mae:>8.3f}{seconds:>9.0f}")
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


def _boosted(
    kind: str, features: Mapping[str, NDArray], targets: Mapping[str, NDArray]
) -> tuple[str, float, float, float, float]:
    """Name, test tau, R^2 and MAE, and seconds of gradient boosting, from features and targets per split."""
    started = time.perf_counter()
    model = GradientBoostingRegressor(
        n_estimators=TREES, max_depth=DEPTH, learning_rate=LEARNING_RATE, subsample=0.5, random_state=0
    ).fit(features["train"], targets["train"])
    scores = [kendalltau(targets["val"], predicted).statistic for predicted in model.staged_predict(features["val"])]
    trees = int(np.nanargmax(scores)) + 1
    predicted = list(model.staged_predict(features["test"]))[trees - 1].clip(0, 1)
    result = metrics(targets["test"], predicted)
    return f"{kind}, {trees} trees", result["tau"], result["r2"], result["mae"], time.perf_counter() - started


def _append(run: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Adds the rows to RUN/baselines.jsonl."""
    with open(run / "baselines.jsonl", "a") as file:
        file.writelines(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)


BASELINES: dict[str, Callable[[Path], str]] = {
    "classification": flat_baselines,
    "generalization": statistics_baselines,
}
"""Task -> the table of a finished run beside its baselines."""
