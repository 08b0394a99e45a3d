"""Losses of many relu networks that classify images, and their gradients, by `relu_classifiers.h`.

Shape letters: B networks, P parameters, M images, T steps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from scalegmn.engine import native


@dataclass(frozen=True, eq=False)
class Classifiers:
    """What relu networks classify.

    Attributes:
        widths: n_0, n_1, ..., the number of classes; relu between layers.
        images: [n, n_0].
        labels: [n], long.
        rows: [T, B, M], long: which images each network reads in each step.

    Raises:
        ValueError: labels are no classes, rows no images, or shapes do not fit.
    """

    widths: Sequence[int]
    images: Tensor
    labels: Tensor
    rows: Tensor

    def __post_init__(self) -> None:
        _refuse_other_shape("images", self.images, (len(self.images), self.widths[0]))
        _refuse_other_shape("labels", self.labels, (len(self.images),))
        if self.rows.ndim != 3:
            raise ValueError(f"rows: found shape {[*self.rows.shape]}, expected [steps, networks, images]")
        for name, numbers, stop in (("labels", self.labels, self.widths[-1]), ("rows", self.rows, len(self.images))):
            if numbers.dtype != torch.long or (numbers.numel() and not 0 <= numbers.min() <= numbers.max() < stop):
                found = f"{numbers.dtype} from {numbers.min()} to {numbers.max()}" if numbers.numel() else numbers.dtype
                raise ValueError(f"{name}: found {found}, expected whole numbers (long) from 0 to {stop - 1}")

    @property
    def num_parameters(self) -> int:
        """P: weight [n_l, n_{l-1}] and bias [n_l] of each layer in turn."""
        return sum(outputs * (inputs + 1) for inputs, outputs in pairwise(self.widths))

    def words(self) -> tuple[list[int], list[object]]:
        """Those of `Classifiers` in relu_classifiers.h, and what they point to."""
        tensors = [self.images.contiguous(), self.labels.contiguous(), self.rows.contiguous()]
        sizes = native.words(self.widths)
        numbers = [*self.rows.shape[1:], self.num_parameters, len(self.widths) - 1]
        return [*numbers, *(tensor.data_ptr() for tensor in tensors), ctypes.addressof(sizes)], [*tensors, sizes]


def losses_and_gradients(
    parameters: Tensor, widths: Sequence[int], images: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy of each network, [B], and its gradient, [B, P].

    Args:
        parameters: [B, P], as `Classifiers.num_parameters` counts them.
        widths: n_0, n_1, ..., the number of classes.
        images: [B, M, n_0].
        labels: [B, M], long.

    Raises:
        ValueError: shapes do not fit, or labels are no classes.
    """
    _refuse_other_shape("images", images, (*labels.shape, widths[0]))
    rows = torch.arange(labels.numel()).view(1, *labels.shape)
    classifiers = Classifiers(widths, images.flatten(0, 1), labels.flatten(), rows)
    _refuse_other_shape("parameters", parameters, (len(labels), classifiers.num_parameters))
    library = native.library()
    assert library is not None
    parameters = parameters.contiguous()
    losses, gradients = parameters.new_empty(len(parameters)), torch.empty_like(parameters)
    words, _kept = classifiers.words()
    words += [*(tensor.data_ptr() for tensor in (parameters, losses, gradients)), torch.get_num_threads()]
    library.relu_classifiers(native.words(words))
    return losses, gradients


def _refuse_other_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tensor.shape != (*shape,):
        raise ValueError(f"{name}: found shape {[*tensor.shape]}, expected {[*shape]}")
