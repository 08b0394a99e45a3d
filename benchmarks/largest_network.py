"""The largest input network [2, n, 2n, 3] that a model can train on at fixed memory, one network at a time.

python benchmarks/largest_network.py [--models scalegmn ...] [--gigabytes 8] [--seconds 300] [--least 16]

A try is one step, forward, backward and AdamW, under the published configuration for MNIST's INRs, in a process of its
own that is ended as soon as its resident memory is above the limit. n is doubled from `--least` until a try fails, then
bisected until the largest that fits and the smallest that does not are within an eighth. A try that takes more than
`--seconds` of processor time ends the search: what fits in memory may then be larger (`time` in the last column).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from step_time import mean_square, random_networks

from scalegmn.experiments.config import build_model
from scalegmn.networks import NetSpec
from scalegmn.training.gradients import backward_in_micro_batches
from scalegmn.training.memory import keep_freed_memory

CONFIGS = Path(__file__).parents[1] / "configs" / "mnist_cls"

MODELS = ("scalegmn", "ng_gnn", "ng_t", "nfn", "dwsnet")

INTERVAL = 0.02
"""Seconds between two looks at the memory of a try."""


class Try(NamedTuple):
    """What became of a step.

    Attributes:
        outcome: whether it fits, or what it exceeds.
        gigabytes: the most resident memory that was seen.
        seconds: of processor time of the whole process.
    """

    outcome: Literal["fits", "memory", "time"]
    gigabytes: float
    seconds: float


def step(name: str, n: int) -> None:
    """One step of a model on one network [2, n, 2n, 3]."""
    keep_freed_memory()
    torch.manual_seed(0)
    spec, device = NetSpec.mlp([2, n, 2 * n, 3], "sine"), torch.device("cpu")
    model = build_model(CONFIGS / f"{name}.yml", spec=spec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    params = random_networks(spec, 1, device)
    model.fit_normalization([params])
    backward_in_micro_batches(lambda part, _: mean_square(model(part)), params, torch.zeros(1), 1)
    optimizer.step()


def attempt(name: str, n: int, gigabytes: float, seconds: float) -> Try:
    """A step in a process of its own, ended where it exceeds a limit.

    Raises:
        RuntimeError: the process failed of itself.
    """
    most, used = 0, 0.0
    process = subprocess.Popen(
        [sys.executable, __file__, "--step", name, str(n)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    exceeded: Literal["memory", "time"] | None = None
    while process.poll() is None and exceeded is None:
        time.sleep(INTERVAL)
        most, used = max(most, resident(process.pid)), max(used, processor_seconds(process.pid))
        if most > gigabytes * 1e9:
            exceeded = "memory"
        elif used > seconds:
            exceeded = "time"
    if exceeded is not None:
        process.kill()
    _, errors = process.communicate()
    if exceeded is None and process.returncode:
        raise RuntimeError(f"{name}, n = {n}: {errors.strip().splitlines()[-1]}")
    return Try(exceeded or "fits", most / 1e9, used)


def resident(pid: int) -> int:
    """Bytes of resident memory of a process at its peak; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def processor_seconds(pid: int) -> float:
    """Processor time of a process, of all its threads; 0 once it has ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def largest(run: Callable[[int], Try], least: int) -> tuple[int, Try, str]:
    """The largest n that fits, its try, and what a larger one exceeds; n = 0 where not even `least` fits."""
    low, best, high, exceeded = 0, Try("fits", 0.0, 0.0), 0, ""
    n = least
    while not high or high - low > high / 8:
        tried = run(n)
        if tried.outcome == "fits":
            low, best = n, tried
        else:
            high, exceeded = n, tried.outcome
            if exceeded == "time" or not low:
                break
        n = (low + high) // 2 if high else 2 * n
    return low, best, exceeded


def main() -> None:
    """Prints a line per try, then a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--seconds", type=float, default=300.0, help="processor time of the longest try")
    parser.add_argument("--least", type=int, default=16, help="n of the first try")
    parser.add_argument("--step", nargs=2, metavar=("MODEL", "N"), help=argparse.SUPPRESS)
    values = parser.parse_args()
    if values.step is not None:
        step(values.step[0], int(values.step[1]))
        return
    rows = []
    for name in values.models:

        def run(n: int, name: str = name) -> Try:
            tried = attempt(name, n, values.gigabytes, values.seconds)
            print(f"{name}, n = {n}: {tried.outcome}, {tried.gigabytes:.2f} GB, {tried.seconds:.0f} s", flush=True)
            return tried

        n, best, exceeded = largest(run, values.least)
        parameters = NetSpec.mlp([2, n, 2 * n, 3], "sine").num_parameters if n else 0
        size = f"[2, {n:,}, {2 * n:,}, 3] | {parameters:,}"
        rows.append(f"| {name} | {size} | {best.gigabytes:.2f} | {best.seconds:.0f} | {exceeded} |")
    print("| model | largest | parameters | peak GB | s | the next exceeds |\n| --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
