"""A finished run of predicting_generalization.py beside statistics of the weights (Unterthiner et al., 2020).

python benchmarks/statistics_baseline.py RUN

Mean, variance and quantiles 0, 1/4, 1/2, 3/4, 1 of each layer's weights and of its biases, and in a mixed zoo the
activation, with scikit-learn's gradient boosting; same zoo, same splits; the number of trees is chosen by tau on the
validation split. Once of the weights as they are, and once of canonical ones, from which the scale of relu neurons is
removed: what a function-invariant model can know. Prints a table and appends it to RUN/baselines.jsonl.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import kendalltau
from sklearn.ensemble import GradientBoostingRegressor

from scalegmn.configuration.parsing import parse
from scalegmn.experiments.config import Config
from scalegmn.networks import NetParams
from scalegmn.symmetry.canonicalize import canonicalize
from scalegmn.tasks.generalization import metrics
from scalegmn.tasks.zoo_task import DEBUG_NETWORKS
from scalegmn.zoos.loader import load_splits

TREES, DEPTH, LEARNING_RATE = 500, 5, 0.05


def statistics(params: NetParams) -> np.ndarray:
    """[B, 14 L], or 14 L + 1 with the activation's number."""
    quantiles = torch.tensor([0, 0.25, 0.5, 0.75, 1])
    columns = [] if params.activation is None else [params.activation[:, None].float()]
    for tensor in (*params.weights, *params.biases):
        flat = tensor.flatten(1)
        columns += [flat.mean(1, keepdim=True), flat.var(1, correction=0, keepdim=True), flat.quantile(quantiles, 1).mT]
    return torch.cat(columns, 1).numpy()


def boosted(kind: str, features: dict[str, np.ndarray], targets: dict[str, np.ndarray]) -> tuple[str | float, ...]:
    """Name, test tau, R^2 and MAE, and seconds of gradient boosting, from features and targets per split."""
    started = time.perf_counter()
    model = GradientBoostingRegressor(
        n_estimators=TREES, max_depth=DEPTH, learning_rate=LEARNING_RATE, subsample=0.5, random_state=0
    ).fit(features["train"], targets["train"])
    scores = [kendalltau(targets["val"], found).statistic for found in model.staged_predict(features["val"])]
    trees = int(np.nanargmax(scores)) + 1
    predicted = list(model.staged_predict(features["test"]))[trees - 1].clip(0, 1)
    found = metrics(targets["test"], predicted)
    return f"{kind}, {trees} trees", found["tau"], found["r2"], found["mae"], time.perf_counter() - started


def main(run: Path) -> None:
    """Fits the baseline on the data of a finished run and prints the table."""
    config = parse(Config, ["--conf", str(run / "config.yml")])
    summary = json.loads((run / "summary.json").read_text())
    zoo, splits = load_splits(config.data, "test_accuracy", DEBUG_NETWORKS if config.debug else None)
    if zoo.sha256 != summary["data"]["sha256"]:
        raise SystemExit(f"error: {zoo.path} is not the zoo that {run} was trained on; make it again")
    networks = {name: nets.read(slice(None)) for name, nets in splits.items()}
    targets = {name: nets.labels.double().numpy() for name, nets in splits.items()}
    rows = [(config.model, *(summary[f"test_{name}"] for name in ("tau", "r2", "mae")), summary["seconds"])]
    for kind, removed in (("statistics", ()), ("without scale", ("scale",))):
        features = {name: statistics(canonicalize(params, removed)) for name, params in networks.items()}
        rows.append(boosted(kind, features, targets))
    columns = ("model", "test_tau", "test_r2", "test_mae", "seconds")
    with open(run / "baselines.jsonl", "a") as file:
        file.writelines(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
    print(f"\nTest accuracy of {len(targets['test']):,} networks, predicted from their weights\n")
    print(f"{'model':<24}{'tau':>8}{'R^2':>8}{'MAE':>8}{'seconds':>9}")
    for name, tau, r2, mae, took in rows:
        print(f"{name:<24}{tau:>8.3f}{r2:>8.3f}{mae:>8.3f}{took:>9.0f}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "summary.json").exists():
        raise SystemExit("error: expected the folder of a finished run: python benchmarks/statistics_baseline.py RUN")
    main(Path(sys.argv[1]))
