"""Reading networks: batches per second from memory and from a memory-mapped zoo.

python benchmarks/data.py [--networks 1000000] [--zoo FOLDER] [--out FILE.jsonl]

Networks are SIRENs [2, 32, 32, 1] with random weights, batches of 128. Measured, in networks/s:

- random: a shuffled epoch of a zoo in memory (as large as fits: at most 200,000 networks are read);
- canonical: the same, with the phase symmetry of each batch removed;
- augmented: the same, with noise and translation;
- sequential: an ordered epoch of the whole memory-mapped zoo;
- published: what a Dataset of one file per network gives, as the published pipeline reads: torch.load, one by one.

and the seconds that opening the zoo takes, and the anonymous memory (not the page cache) that the sequential epoch
adds. The zoo is made at FOLDER (default: a temporary one) unless it is there. Prints and appends a line to FILE.
"""

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from scalegmn.networks import NetSpec
from scalegmn.networks.siren import init_siren
from scalegmn.zoos.augment import AugmentConfig
from scalegmn.zoos.loader import DataConfig, LabelledNets, augmented, load_splits
from scalegmn.zoos.zoo_format import Networks, write_zoo

BATCH, IN_MEMORY, SECONDS = 128, 200_000, 5
SPEC = NetSpec.mlp([2, 32, 32, 1], "sine")


class RandomParts:
    """A zoo's networks, part by part."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __iter__(self) -> Iterator[Networks]:
        for number, start in enumerate(range(0, self.num, 10_000)):
            size = min(10_000, self.num - start)
            params = init_siren(SPEC, size, torch.Generator().manual_seed(number))
            yield Networks((params,), {"label": torch.arange(size) % 10})


def anonymous_bytes() -> int:
    """Memory of this process that is not a file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def rate(read: Callable[[], Iterator[int]]) -> float:
    """Networks per second over SECONDS at least, after a warm-up of a tenth of that."""
    for limit in (SECONDS / 10, SECONDS):
        count, started = 0, time.perf_counter()
        while (seconds := time.perf_counter() - started) < limit:
            for size in read():
                count += size
                if time.perf_counter() - started > limit:
                    break
    return count / seconds


def published(nets: LabelledNets) -> float:
    """Networks per second with one file and one torch.load per network."""
    files = []
    for row in range(256):
        params = nets.zoo.params[row : row + 1]
        state = {f"seq.{k}.weight": weight[0].clone() for k, weight in enumerate(params.weights)}
        state |= {f"seq.{k}.bias": bias[0].clone() for k, bias in enumerate(params.biases)}
        files.append(io.BytesIO())
        torch.save(state, files[-1])

    def read() -> Iterator[int]:
        for start in range(0, len(files), BATCH):
            states = []
            for file in files[start : start + BATCH]:
                file.seek(0)
                states.append(torch.load(file, weights_only=True))
            {name: torch.stack([state[name] for state in states]) for name in states[0]}
            yield len(states)

    return rate(read)


def main() -> None:
    """Makes or opens the zoo, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=1_000_000)
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.zoo or Path(folder) / "zoo"
        if not path.exists():
            rows = torch.randperm(arguments.networks, generator=torch.Generator().manual_seed(0))
            num = arguments.networks // 10
            splits = {"val": rows[:num].sort().values, "test": rows[num : 2 * num].sort().values}
            splits = {"train": rows[2 * num :].sort().values, **splits}
            write_zoo(path, RandomParts(arguments.networks), splits, {})
        config = DataConfig(str(path), canonicalize=())
        started = time.perf_counter()
        _, splits = load_splits(config, "label")
        seconds = time.perf_counter() - started
        train = splits["train"]
        whole = replace(train, rows=torch.arange(len(train.zoo)), labels=train.zoo.columns["label"])
        some = replace(train, rows=train.rows[:IN_MEMORY], labels=train.labels[:IN_MEMORY])
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(len(some), generator=generator)
        for _ in some.batches():  # into memory
            pass
        noisy = replace(config, augment=AugmentConfig(noise=0.1, translate=0.1))
        found = {
            "random": rate(lambda: (len(y) for _, y in some.batches(order.split(BATCH)))),
            "canonical": rate(
                lambda: (len(y) for _, y in replace(some, removed=("phase",)).batches(order.split(BATCH)))
            ),
            "augmented": rate(
                lambda: (len(augmented(noisy, x, y, generator)[1]) for x, y in some.batches(order.split(BATCH)))
            ),
        }
        before, started = anonymous_bytes(), time.perf_counter()
        largest = 0
        for _ in whole.batches(BATCH):
            largest = max(largest, anonymous_bytes()) if torch.rand(()) < 0.01 else largest
        found["sequential"] = len(whole) / (time.perf_counter() - started)
        found["published"] = published(train)
    threads = torch.get_num_threads()
    print(f"{len(whole):,} x {SPEC}, batches of {BATCH}, {threads} threads, torch {torch.__version__}")
    print(f"opened in {seconds:.2f} s; the sequential epoch added {(largest - before) / 1e6:.0f} MB")
    for name, value in found.items():
        print(f"{name:<11}{value:>12,.0f} networks/s{value / found['published']:>9,.0f} x published")
    if arguments.out:
        row = {"networks": len(whole), "threads": threads, "open_s": seconds, "added_bytes": largest - before, **found}
        with open(arguments.out, "a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
