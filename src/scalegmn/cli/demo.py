"""`scalegmn demo`: a zoo, a training run, simple baselines beside it, and a page, in the current folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from scalegmn.cli import explore, optimizers, train
from scalegmn.cli.arguments import Arguments
from scalegmn.cli.zoo import cnn, inr
from scalegmn.experiments.baselines import BASELINES
from scalegmn.experiments.trained import read_summary


@dataclass(frozen=True)
class Demo:
    """What a demo makes.

    Attributes:
        make_zoo: the command that makes its zoo.
        recipe: the zoo's configuration.
        conf: the run's configuration.
        folder: where its runs go.
    """

    make_zoo: Callable[[Sequence[str]], None]
    recipe: str
    conf: str
    folder: str


DEMOS = {
    "classification": Demo(inr.run, "zoos/digits_inr.yml", "digits_cls/scalegmn_probes.yml", "runs/demo"),
    "editing": Demo(inr.run, "zoos/digits_inr.yml", "digits_editing/scalegmn_probes.yml", "runs/demo-editing"),
    "generalization": Demo(
        cnn.run, "zoos/digits_cnn.yml", "digits_cnn/scalegmn_probes.yml", "runs/demo-generalization"
    ),
}
"""Task -> its demo."""


OPTIMIZER = "optimizer"
"""The demo that makes no zoo: two learned optimisers beside tuned ones."""


def run(words: Sequence[str]) -> None:
    """Makes the zoo unless it is there, trains, prints the table, and writes a page that shows the run and its zoo."""
    parser = Arguments("scalegmn demo", "Make a small zoo, train on it, and compare the result with simple baselines.")
    parser.add_argument(
        "task", nargs="?", choices=[*DEMOS, OPTIMIZER], default="classification", help="(classification)"
    )
    parser.add_argument("--out", type=Path, help="the run's folder; default: runs/demo.../<time>")
    values = parser.read(words)
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    if values.task == OPTIMIZER:
        _optimizers(values.out or Path("runs/demo-optimizer") / now)
        return
    demo = DEMOS[values.task]
    out = values.out or Path(demo.folder) / now
    demo.make_zoo(["--conf", f"configs/{demo.recipe}"])
    train.run([values.task, "--conf", f"configs/{demo.conf}", "--run_dir", str(out)])
    if values.task in BASELINES:
        print(f"\n{BASELINES[values.task](out)}")
    zoo = read_summary(out)["data"]["zoo"]
    explore.run([str(out), zoo, "--out", str(out / "page.html")])


def _optimizers(out: Path) -> None:
    """Meta-trains ScaleGMN and FF to train networks on digits, and prints the table."""
    runs = [out / network for network in ("ff", "scalegmn")]
    for folder in runs:
        options = ["--conf", "configs/l2o/digits.yml", "--optimizer.network", folder.name, "--run_dir", str(folder)]
        train.run(["optimizer", *options])
    print()
    optimizers.run([*map(str, runs), "--out", str(out / "comparison")])
