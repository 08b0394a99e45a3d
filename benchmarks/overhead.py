"""What the platform costs: a training step beside its bare parts.

python benchmarks/overhead.py [--conf FILE] [--rounds 20] [--steps 10] [--out FILE.jsonl] [--data.dataset_path ZOO ...]

The bare step is forward, backward, gradient clipping and AdamW on batches that are already in memory. The platform's is
`Trainer.train_epoch` on the same batches: reading and canonicalising them, the schedule, the guard against what is not
finite, random states, sums for the log. Both take turns, round by round; the median of the rounds' ratios counts. The
time to save a state, after every epoch, is given beside it.
"""

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from scalegmn.experiments.config import read_config
from scalegmn.reporting.run_folder import Run
from scalegmn.tasks.classification import Classification
from scalegmn.training.launch import launch
from scalegmn.training.optimization import build_optimizer
from scalegmn.training.trainer import Trainer

CONF = Path(__file__).parents[1] / "configs" / "digits_cls" / "scalegmn.yml"


class FewBatches(Classification):
    """The classification task with short epochs, all of the same batches."""

    def shuffle(self, generator: torch.Generator) -> list[torch.Tensor]:
        """The first batches of the training split."""
        return list(torch.arange(len(self.splits["train"])).split(self.batch_size))[: self.steps_per_epoch]


def main() -> None:
    """Measures, prints, appends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conf", type=Path, default=CONF)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10, help="steps in a round")
    parser.add_argument("--out", type=Path, help="append the figures to this JSONL file")
    arguments, words = parser.parse_known_args()
    config = read_config(["--conf", str(arguments.conf), *words])
    fabric = launch(config.train_args.device, 1, config.precision)
    task = FewBatches(config.data, config.batch_size, config.model_config)
    per_epoch, task.steps_per_epoch = task.steps_per_epoch, arguments.steps
    torch.manual_seed(0)
    model = config.model_config.build(task.spec)
    bare = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "run", "", {})
        trainer = Trainer(fabric, task, model, config.train_args, config.optimization, run)
        task.prepare(bare)
        bare.to(fabric.device).train()
        optimizer, _ = build_optimizer(config.optimization, bare.parameters(), 1)
        batches = list(task.train_batches(task.shuffle(torch.Generator()), torch.Generator(), fabric.device))

        def platform() -> None:
            trainer.progress.step = 0
            trainer.train_epoch()

        def parts() -> None:
            for params, labels in batches:
                optimizer.zero_grad()
                task.loss(bare, params, labels).backward()
                nn.utils.clip_grad_norm_(bare.parameters(), config.optimization.clip_grad_max_norm)
                optimizer.step()
            if fabric.device.type == "cuda":
                torch.cuda.synchronize()

        def seconds(call) -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        platform()
        parts()
        ratios, steps = [], []
        for number in range(arguments.rounds):
            order = [platform, parts][:: 1 - 2 * (number % 2)]
            found = {call: seconds(call) for call in order}
            ratios.append(found[platform] / found[parts])
            steps.append(found[parts] / arguments.steps)
        save = statistics.median(seconds(trainer.save_state) for _ in range(5))
    step = statistics.median(steps)
    figures = {
        "conf": str(arguments.conf.name),
        "batch_size": config.batch_size,
        "device": str(fabric.device),
        "threads": torch.get_num_threads(),
        "bare_step_ms": 1e3 * step,
        "overhead": statistics.median(ratios) - 1,
        "overhead_quartiles": [quartile - 1 for quartile in statistics.quantiles(ratios)[::2]],
        "save_ms": 1e3 * save,
        "save_share_of_epoch": save / (step * per_epoch),
        "torch": torch.__version__,
    }
    print(", ".join(f"{key} {value}" for key, value in figures.items()))
    if arguments.out is not None:
        with arguments.out.open("a") as file:
            file.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
