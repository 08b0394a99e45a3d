"""Training steps of this package and of another implementation, in turns in one run.

python benchmarks/against.py [ROW ...] --other FILE [--path FOLDER ...] [--python PROGRAM] [--rounds 7] [--threads 1]
    [--precision auto] [--compile] [--out FILE.jsonl]

FILE defines two functions:

    build(row) -> state     row is a dictionary, see `ROWS`: what to build, on random networks
    step(state) -> None     forward, backward and AdamW on one batch

Each implementation runs in a process of its own, so that FILE may import another version of this package: --path is put
in front of its sys.path, --python is its interpreter. For an earlier commit, for example,

    git worktree add ../earlier COMMIT
    python benchmarks/against.py --other earlier.py --path ../earlier/src ../earlier/benchmarks

    # earlier.py
    import argparse, torch, step_time
    from scalegmn.experiments.config import build_model
    from scalegmn.networks import NetSpec

    def build(row):
        spec = NetSpec.mlp(row["layout"], "sine")
        model = build_model(step_time.CONFIGS / row["conf"], row["overrides"], spec)
        params = step_time.random_networks(spec, row["batch_size"], torch.device("cpu"))
        options = argparse.Namespace(precision="fp32", compile=False, inference=False)
        return step_time.build_step(model, model, params, options)

    def step(state):
        state()

Reported per row: networks per second of both (medians), the median of the rounds' ratios, the seconds of the first step
(cold: with what is built or compiled then), and the peak memory of each process.
"""

import argparse
import gc
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

SECONDS = 0.2
"""Steps shorter than this are repeated within a round."""


def row(conf: str, layout: list[int], batch_size: int, *overrides: str) -> dict[str, Any]:
    """A case: the configuration, settings in place of its own, and the random networks."""
    return {"conf": conf, "overrides": list(overrides), "layout": layout, "batch_size": batch_size}


DIGITS, MNIST = [2, 12, 12, 1], [2, 32, 32, 1]
ROWS = {
    "forward_16": row("mnist_cls/scalegmn.yml", MNIST, 16),
    "forward_64": row("mnist_cls/scalegmn.yml", MNIST, 64),
    "bidirectional_16": row("mnist_cls/scalegmn_bidir.yml", MNIST, 16),
    "digits_forward_64": row("mnist_cls/scalegmn.yml", DIGITS, 64, "scalegmn_args.hidden_dim=32"),
    "digits_bidirectional_64": row("mnist_cls/scalegmn_bidir.yml", DIGITS, 64, "scalegmn_args.hidden_dim=32"),
    "digits_ng_gnn_64": row("mnist_cls/ng_gnn.yml", DIGITS, 64, "ng_gnn_args.hidden_dim=32"),
    "ng_gnn_16": row("mnist_cls/ng_gnn.yml", MNIST, 16, "ng_gnn_args.hidden_dim=32"),
    "ng_gnn_probes_16": row(
        "mnist_cls/ng_gnn.yml", MNIST, 16, "ng_gnn_args.hidden_dim=32", "ng_gnn_args.num_probes=64"
    ),
}
"""Name -> what is trained: sine networks of a layout."""


def build(case: dict[str, Any]) -> Callable[[], None]:
    """This package's training step."""
    import step_time
    import torch

    from scalegmn.experiments.config import build_model, read_config_file
    from scalegmn.networks import NetSpec
    from scalegmn.training.memory import keep_freed_memory

    keep_freed_memory()
    spec = NetSpec.mlp(case["layout"], "sine")
    settings = [*case["overrides"], "train_args.device=cpu", f"train_args.precision={case.get('precision', 'auto')}"]
    config = read_config_file(step_time.CONFIGS / case["conf"], settings)
    model = build_model(config, spec=spec)
    params = step_time.random_networks(spec, case["batch_size"], torch.device("cpu"))
    compiles = bool(case.get("compile"))
    precision = config.precision.removesuffix("-mixed")
    options = argparse.Namespace(precision=precision, compile=compiles, inference=False)
    gc.collect()
    gc.freeze()  # as the trainer does
    return step_time.build_step(model, torch.compile(model, fullgraph=True) if compiles else model, params, options)


def step(state: Callable[[], None]) -> None:
    """One training step."""
    state()


def work(file: str, case: dict[str, Any]) -> None:
    """A process that does as many steps as each line of stdin says, and answers with their seconds and its memory."""
    import torch

    torch.manual_seed(0)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an implementation prints does not mix with the answers
    place = importlib.util.spec_from_file_location("implementation", file)
    assert place is not None
    assert place.loader is not None
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    state = module.build(case)
    for line in sys.stdin:
        started = time.perf_counter()
        for _ in range(int(line)):
            module.step(state)
        seconds = (time.perf_counter() - started) / int(line)
        print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, file=answers, flush=True)


class Worker:
    """A process of `work`.

    Args:
        name: the file with `build` and `step`.
        case: what to build.
        path: folders that it imports from first.
        program: its interpreter.
        threads: of it.
    """

    def __init__(self, name: str, case: dict[str, Any], path: list[str], program: str, threads: int) -> None:
        self.name, self.memory_gb, pipe = name, 0.0, subprocess.PIPE
        command = [program, __file__, "--work", name, json.dumps(case), *path]
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def seconds(self, num_steps: int) -> float:
        """The seconds of each of so many steps."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        line = ""
        with suppress(BrokenPipeError):
            print(num_steps, file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: {self.name} ended with exit code {self.process.wait()}")
        seconds, self.memory_gb = map(float, line.split())
        return seconds

    def stop(self) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The figures of a row."""
    case, threads = ROWS[name], arguments.threads
    ours = {**case, "compile": arguments.compile, "precision": arguments.precision}
    own = Worker(__file__, ours, [str(Path(__file__).parent)], sys.executable, threads)
    other = Worker(arguments.other, case, arguments.path, arguments.python or sys.executable, threads)
    try:
        cold = [worker.seconds(1) for worker in (own, other)]
        repeats = [max(1, round(SECONDS / worker.seconds(1))) for worker in (own, other)]
        times: list[tuple[float, float]] = []
        for number in range(arguments.rounds):  # each is first in every other round
            first, second = (0, 1) if number % 2 else (1, 0)
            seconds = {k: (own, other)[k].seconds(repeats[k]) for k in (first, second)}
            times.append((seconds[0], seconds[1]))
    finally:
        own.stop()
        other.stop()
    medians = [statistics.median(column) for column in zip(*times, strict=True)]
    return {
        "row": name,
        "networks_per_second": ROWS[name]["batch_size"] / medians[0],
        "other_networks_per_second": ROWS[name]["batch_size"] / medians[1],
        "ratio": statistics.median(theirs / ours for ours, theirs in times),
        "cold_seconds": cold[0],
        "other_cold_seconds": cold[1],
        "peak_gb": own.memory_gb,
        "other_peak_gb": other.memory_gb,
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "compile": arguments.compile,
        "precision": arguments.precision,
    }


def main() -> None:
    """Measures the chosen rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"some of {', '.join(ROWS)}; default: all")
    parser.add_argument("--other", required=True, metavar="FILE", help="the other implementation")
    parser.add_argument("--path", nargs="+", default=[], metavar="FOLDER", help="where the other finds its modules")
    parser.add_argument("--python", metavar="PROGRAM", help="the other's interpreter; default: this one")
    parser.add_argument("--rounds", type=int, default=7, help="rounds, of which medians count (7)")
    parser.add_argument("--threads", type=int, default=1, help="of each process (1)")
    parser.add_argument("--precision", default="auto", help="of this package, as train_args.precision (auto)")
    parser.add_argument("--compile", action="store_true", help="torch.compile this package's model")
    parser.add_argument("--out", type=Path, help="append the figures to this JSONL file")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.rows if name not in ROWS]
    if unknown:
        parser.error(f"found {unknown[0]}, expected some of {', '.join(ROWS)}")
    for name in arguments.rows or ROWS:
        figures = measure(name, arguments)
        print(
            "{row:<24}{networks_per_second:>9.1f} networks/s, the other {other_networks_per_second:>8.1f}, ratio "
            "{ratio:>5.2f}; first step {cold_seconds:.1f} s and {other_cold_seconds:.1f} s; peak {peak_gb:.2f} GB and "
            "{other_peak_gb:.2f} GB".format(**figures),
            flush=True,
        )
        if arguments.out is not None:
            with arguments.out.open("a") as file:
                file.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        sys.path[:1] = map(os.path.abspath, sys.argv[4:])  # not this file's folder
        work(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
