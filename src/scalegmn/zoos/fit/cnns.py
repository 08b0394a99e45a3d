"""Train many small CNNs, on all cores of a CPU or on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor

from scalegmn.networks import BUILT_IN, NetParams, NetSpec, not_built_in
from scalegmn.zoos.fit.cnn_descent import Choices, LabelledImages, TrainingResult
from scalegmn.zoos.fit.common import OnDone, seeded
from scalegmn.zoos.fit.equal_cnns import EqualFit, networks_per_core
from scalegmn.zoos.fit.mixed_cnns import MIXED_AT_ONCE, MixedFit


def train_cnns(
    specs: Sequence[NetSpec],
    choices: Choices,
    images: LabelledImages,
    checkpoints: Sequence[int],
    batch_size: int,
    padding: Literal["same", "valid"] | None,
    seeds: tuple[int, int],
    device: str = "cpu",
    on_done: OnDone = lambda num_networks: None,
) -> TrainingResult:
    """Trains B CNNs from random weights: on a CPU each core by itself and few at a time.

    Networks that see equally many images (and have one activation, where all have one architecture) take their steps
    together. The result depends on neither the number of cores nor their timing.

    Args:
        specs: the architecture of each; convolutions, then one linear layer.
        choices: how each is trained.
        images: on the CPU.
        checkpoints: ascending numbers of epochs.
        batch_size: images per step; all images of a network where it has fewer.
        padding: all have one architecture but for its activation, and stride 2; padding as in
            `networks.cnn.evaluate_cnn`. None: any architectures with odd kernels, stride 1 and padding `same`.
        seeds: numbers that seed everything random.
        device: `cpu` or `cuda`.
        on_done: called with the number of networks that have been trained.
    """
    is_cuda, activations, most = torch.device(device).type == "cuda", None, MIXED_AT_ONCE
    if padding is not None:
        activations = [spec.layers[0].activation for spec in specs]
        height, width = images.pixels.shape[2:]
        most = networks_per_core(specs[0], (height, width), batch_size)
    chunks = _chunks(choices, activations, len(specs) if is_cuda else most)
    pixels, labels, train, test = (value.to(device) for value in vars(images).values())

    def fit(number: int) -> TrainingResult:
        rows, generator = chunks[number], seeded(*seeds, number)
        of_chunk = [specs[row] for row in rows]
        std = choices.init_std[rows]
        if padding is None:
            nets = [_initial(spec, std[k : k + 1], generator) for k, spec in enumerate(of_chunk)]
        else:
            nets = [_initial(of_chunk[0], std, generator)]
        seen = round(choices.train_fraction[rows[0]].item() * len(train))
        draws = torch.rand(len(rows), len(train), generator=generator).argsort(1)[:, :seen].to(device)
        if is_cuda:
            generator = torch.Generator(device).manual_seed(generator.initial_seed())
        on_device = Choices(**{name: value.to(device) for name, value in vars(choices[rows]).items()})
        arguments = ([net.to(device) for net in nets], on_device, pixels, labels, min(batch_size, seen), generator)
        run = MixedFit(*arguments) if padding is None else EqualFit(*arguments, padding=padding)
        return run.run(train[draws], test, checkpoints)

    threads, parts = torch.get_num_threads(), list[TrainingResult]()
    numbers = range(len(chunks))[::-1]  # those that see most images first
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for number, part in zip(numbers, pool.map(fit, numbers), strict=True):
                parts.insert(0, part)
                on_done(len(chunks[number]))
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
    back = torch.cat(chunks).argsort()

    def joined(name: str) -> Tensor:
        """[B, E] in the order of the arguments."""
        return torch.cat([getattr(part, name).cpu() for part in parts])[back]

    nets = [net.to("cpu") for part in parts for net in part.nets]
    columns = (joined(name) for name in ("train_accuracy", "test_accuracy", "finite"))
    return TrainingResult(tuple(nets[place] for place in back), *columns)


def _chunks(choices: Choices, activations: Sequence[str] | None, most: int) -> list[Tensor]:
    """The numbers of networks that take their steps together: they see equally many images and have one activation.

    Args:
        choices: how each network is trained.
        activations: the activation of each; None: it does not matter.
        most: networks in a chunk.
    """
    numbers = torch.zeros(len(choices.optimizer), dtype=torch.long)
    if activations is not None:
        places = {name: place for place, name in enumerate((*BUILT_IN, *not_built_in(activations)))}
        numbers = torch.tensor([places[name] for name in activations])
    order = choices.optimizer.argsort(stable=True)
    for key in (choices.train_fraction, numbers):
        order = order[key[order].argsort(stable=True)]
    keys = torch.stack([numbers[order].double(), choices.train_fraction[order].double()], 1)
    sizes = keys.unique_consecutive(dim=0, return_counts=True)[1].tolist()
    return [chunk for group in order.split(sizes) for chunk in group.split(most)]


def _initial(spec: NetSpec, std: Tensor, generator: torch.Generator) -> NetParams:
    """Networks of one architecture with normal weights of standard deviation `std`, [B], and biases 0."""
    weights = tuple(
        torch.einsum("b,b...->b...", std, torch.randn(len(std), *layer.weight_shape, generator=generator))
        for layer in spec.layers
    )
    return NetParams(spec, weights, tuple(torch.zeros(len(std), layer.out_dim) for layer in spec.layers))
