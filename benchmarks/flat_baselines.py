"""A finished run beside models that are blind to the symmetries: scikit-learn's on the flattened weights.

python benchmarks/flat_baselines.py RUN

Logistic regression and an MLP read the same networks (same zoo, same splits, canonical or not as in the run), each
column standardised on the training split. Prints a table and appends it to RUN/baselines.jsonl.
"""

import json
import sys
import time
import warnings
from pathlib import Path

from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scalegmn.configuration.parsing import parse
from scalegmn.experiments.config import Config
from scalegmn.tasks.zoo_task import DEBUG_NETWORKS
from scalegmn.zoos.loader import load_splits

BASELINES = {
    "logistic regression": LogisticRegression(max_iter=200),
    "MLP, 256-128": MLPClassifier((256, 128), max_iter=30, random_state=0),
}


def main(run: Path) -> None:
    """Fits the baselines on the data of a finished run and prints the table."""
    config = parse(Config, ["--conf", str(run / "config.yml")])
    summary = json.loads((run / "summary.json").read_text())
    zoo, splits = load_splits(config.data, "label", DEBUG_NETWORKS if config.debug else None)
    if zoo.sha256 != summary["data"]["sha256"]:
        raise SystemExit(f"error: {zoo.path} is not the zoo that {run} was trained on; make it again")
    features = {name: nets.read(slice(None)).flatten().numpy() for name, nets in splits.items()}
    labels = {name: nets.labels.numpy() for name, nets in splits.items()}
    rows = [(config.model, summary["test_accuracy"], summary["parameters"], summary["seconds"])]
    for name, estimator in BASELINES.items():
        started = time.perf_counter()
        model = make_pipeline(StandardScaler(), estimator)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(features["train"], labels["train"])
        arrays = estimator.coefs_ + estimator.intercepts_ if "MLP" in name else [estimator.coef_, estimator.intercept_]
        seconds = time.perf_counter() - started
        rows.append((name, model.score(features["test"], labels["test"]), sum(a.size for a in arrays), seconds))
    columns = ("model", "test_accuracy", "parameters", "seconds")
    with open(run / "baselines.jsonl", "a") as file:
        file.writelines(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
    print(f"\nTest accuracy on {len(labels['test']):,} networks of held-out images\n")
    print(f"{'model':<22}{'accuracy':>10}{'parameters':>12}{'seconds':>9}")
    for name, accuracy, parameters, seconds in rows:
        print(f"{name:<22}{accuracy:>10.1%}{parameters:>12,}{seconds:>9.0f}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "summary.json").exists():
        raise SystemExit("error: expected the folder of a finished run: python benchmarks/flat_baselines.py RUN")
    main(Path(sys.argv[1]))
