"""What reading modules with random weights takes: processor time and the peak of memory so far, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/read_modules.py

Needs `transformers`.
"""

import logging
import resource
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
import transformers
from torch import Tensor, nn

import scalegmn


class Scores(nn.Module):
    """The scores that a model of `transformers` returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, words] or [B, classes] of a batch."""
        return self.model(x).logits


def gpt2(**options: int) -> nn.Module:
    """GPT-2, small unless options say otherwise."""
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False, **options))


def resnet() -> nn.Module:
    """ResNet-50 with 1,000 classes."""
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))


def main() -> None:
    """Prints a line for each module."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    words = torch.randint(50, (1, 8))
    narrow = {"n_embd": 32, "n_head": 4, "n_positions": 16, "vocab_size": 50}
    cases: list[tuple[str, Callable[[], nn.Module], Tensor]] = [
        (f"GPT-2 of width 32, {depth} blocks", partial(gpt2, n_layer=depth, **narrow), words) for depth in (12, 24, 48)
    ]
    cases += [
        ("ResNet-50", resnet, torch.randn(1, 3, 64, 64)),
        ("BERT-base", lambda: transformers.BertForMaskedLM(transformers.BertConfig()), words),
        ("GPT-2 small", gpt2, words),
    ]
    scalegmn.from_module(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3))  # imports
    for name, make, x in cases:
        module = Scores(make()).eval()
        start = time.process_time()
        spec = scalegmn.from_module(module, x).spec
        seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{name}: {seconds:.1f} s, {spec.num_layers} layers, {spec.num_parameters:,} parameters, {peak:.2f} GB")


if __name__ == "__main__":
    main()
