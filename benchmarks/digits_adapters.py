"""A folder of low-rank adapters, each of which has learned one digit: files as `peft` saves them, and labels.csv.

python benchmarks/digits_adapters.py --out data/digits_adapters
scalegmn zoo import data/digits_adapters --labels data/digits_adapters/labels.csv --out data/digits_lora
scalegmn train classification --conf digits_lora/mvprobe.yml

One denoiser [64, 32, 64] with relu learns scikit-learn's digits with noise added. Each adapter continues from it on a
few images of one digit, with factors of rank r of both layers: W + B A, B from zero, A random. Its label is the digit.
Adapters for validation and for testing learn other images than those for training.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from scalegmn.zoos.images import load_digits_images

LAYOUT, NOISE = (64, 32, 64), 0.3
"""Of the denoiser: its layers, and the standard deviation of the noise on pixels from 0 to 1."""

SPLITS = {"train": 0.6, "val": 0.1, "test": 0.3}
"""Shares of the adapters, and of the images of each digit."""


def denoised(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """[..., k, 64] pixels of k images -> the same; weights [..., out, in], biases [out]."""
    (w1, w2), (b1, b2) = weights, biases
    return torch.relu(x @ w1.mT + b1) @ w2.mT + b2


def loss(images: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The squared error of each denoiser, summed over all."""
    noisy = images + NOISE * torch.randn_like(images)
    return (denoised(noisy, weights, biases) - images).square().mean((-2, -1)).sum()


def fit_base(images: Tensor, steps: int = 1000) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of the denoiser of all digits."""
    weights = [torch.randn(o, i) / i**0.5 for i, o in pairwise(LAYOUT)]
    biases = [torch.zeros(o) for o in LAYOUT[1:]]
    optimizer = torch.optim.Adam([x.requires_grad_() for x in (*weights, *biases)], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(images[torch.randint(len(images), (128,))], weights, biases).backward()
        optimizer.step()
    return [x.detach() for x in weights], [x.detach() for x in biases]


def fit_adapters(
    images: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], rank: int, steps: int = 200
) -> list[tuple[Tensor, Tensor]]:
    """A [N, r, in] and B [N, out, r] of both layers, of N adapters at once; images [N, k, 64]."""
    num = len(images)
    factors = [(torch.randn(num, rank, i) / i**0.5, torch.zeros(num, o, rank)) for i, o in pairwise(LAYOUT)]
    optimizer = torch.optim.Adam([x.requires_grad_() for pair in factors for x in pair], lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(images, [w + b @ a for w, (a, b) in zip(weights, factors, strict=True)], biases).backward()
        optimizer.step()
    return [(a.detach(), b.detach()) for a, b in factors]


def ranges(num: int) -> list[tuple[str, int, int]]:
    """Each split with the first of its items, and the one after its last, of so many."""
    ends = [round(share * num) for share in (0.0, *accumulate(SPLITS.values()))]
    return [(split, start, end) for split, (start, end) in zip(SPLITS, pairwise(ends), strict=True)]


def choose_images(digit_of: Tensor, labels: Tensor, splits: Sequence[str], num: int) -> tuple[Tensor, Tensor]:
    """So many images for each adapter, of its digit and split, [N, num]; and those of the training split, which the
    denoiser learns."""
    chosen, seen = torch.empty(len(labels), num, dtype=torch.long), []
    for digit in range(10):
        rows = (digit_of == digit).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows))]
        for split, start, end in ranges(len(rows)):
            of_split = rows[start:end]
            seen += [of_split] if split == "train" else []
            for k in range(len(labels)):
                if splits[k] == split and labels[k] == digit:
                    chosen[k] = of_split[torch.randperm(len(of_split))[:num]]
    return chosen, torch.cat(seen)


def main() -> None:
    """Makes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/digits_adapters"))
    parser.add_argument("--num", type=int, default=3000, help="adapters")
    parser.add_argument("--images", type=int, default=4, help="images that each learns")
    parser.add_argument("--rank", type=int, default=4)
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f"--out: {args.out} exists already; choose another")
    torch.manual_seed(0)
    digits = load_digits_images()
    pixels, digit_of = torch.as_tensor(digits.pixels).float().flatten(1), torch.as_tensor(digits.labels)
    labels = torch.arange(args.num) % 10
    splits = [split for split, start, end in ranges(args.num) for _ in range(start, end)]
    chosen, seen = choose_images(digit_of, labels, splits, args.images)
    weights, biases = fit_base(pixels[seen])
    factors = fit_adapters(pixels[chosen], weights, biases, args.rank)
    args.out.mkdir(parents=True)
    with open(args.out / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "label", "split"])
        for k in range(args.num):
            state = {}
            for layer, (a, b) in zip(("0", "2"), factors, strict=True):
                state[f"base_model.model.{layer}.lora_A.weight"] = a[k].clone()
                state[f"base_model.model.{layer}.lora_B.weight"] = b[k].clone()
            save_file(state, args.out / f"{k:05}.safetensors")
            writer.writerow([f"{k:05}", int(labels[k]), splits[k]])
    print(f"{args.out}: {args.num:,} adapters of rank {args.rank}")


if __name__ == "__main__":
    main()
