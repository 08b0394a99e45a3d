"""Normalisation of the input networks' parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

_LEAST_DEVIATION = 1e-4
"""Standard deviations of statistics below this one are taken for rounding errors."""

_LARGEST_STATISTIC = 5.0
"""Where standardised statistics are clipped."""


class InputNormalization(nn.Module):
    """w -> w / s_l and b -> b / s'_l with one scalar per layer l; centred, (w - m_l) / s_l and (b - m'_l) / s'_l.

    The output layer of every network has the scalars of layer L. Layer l < L of a network with fewer layers has those
    of layer l. The scalars are the same for all networks, so the map commutes with permutations of neurons and, unless
    it is centred, with rescalings. Scalars are buffers, saved in checkpoints; before `fit`, s = 1 and m = 0.

    Args:
        num_layers: L, the number of layers of the deepest networks.
        centred: subtract the mean and divide by the standard deviation, rather than by the root mean square.
    """

    weight_scales: Tensor
    bias_scales: Tensor
    weight_means: Tensor
    bias_means: Tensor

    def __init__(self, num_layers: int, centred: bool = False) -> None:
        super().__init__()
        self.centred = centred
        self.register_buffer("weight_scales", torch.ones(num_layers))
        self.register_buffer("bias_scales", torch.ones(num_layers))
        if centred:
            self.register_buffer("weight_means", torch.zeros(num_layers))
            self.register_buffer("bias_means", torch.zeros(num_layers))

    @torch.no_grad()
    def fit(self, batches: Iterable[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> None:
        """Sets s to the root mean square (centred: m to the mean, s to the standard deviation) over all batches; s is 1
        where it would be 0.

        Args:
            batches: weights and biases per layer, [B, ...] each.
        """
        num_layers = len(self.weight_scales)
        sums, squares, counts = torch.zeros(3, 2 * num_layers, dtype=torch.float64, device=self.weight_scales.device)
        for weights, biases in batches:
            rows = self._rows(len(weights))
            rows = torch.cat([rows, num_layers + rows])
            tensors = [tensor.double() for tensor in (*weights, *biases)]
            sums[rows] += torch.stack([tensor.sum() for tensor in tensors])
            squares[rows] += torch.stack([tensor.square().sum() for tensor in tensors])
            counts[rows] += torch.tensor([tensor.numel() for tensor in tensors], device=sums.device)
        counts.clamp_(min=1)  # of layers that no network has
        means = sums / counts if self.centred else torch.zeros_like(sums)
        scales = (squares / counts - means.square()).clamp_min(0).sqrt()
        scales = torch.where(scales > 0, scales, 1.0)
        for kind, part in (("weight", slice(len(self.weight_scales))), ("bias", slice(len(self.weight_scales), None))):
            getattr(self, f"{kind}_scales").copy_(scales[part])
            if self.centred:
                getattr(self, f"{kind}_means").copy_(means[part])

    def forward(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
        """Normalised weights and biases, per layer, of the shapes given."""
        if self.centred:
            weights = [weight - mean for weight, mean in self._with(self.weight_means, weights)]
            biases = [bias - mean for bias, mean in self._with(self.bias_means, biases)]
        return (
            tuple(weight / scale for weight, scale in self._with(self.weight_scales, weights)),
            tuple(bias / scale for bias, scale in self._with(self.bias_scales, biases)),
        )

    def inverse(self, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], ...]:
        """The inverse of `forward`, of a centred normalisation: weights and biases per layer, of the shapes given."""
        weights = [weight * scale for weight, scale in self._with(self.weight_scales, weights)]
        biases = [bias * scale for bias, scale in self._with(self.bias_scales, biases)]
        return (
            tuple(weight + mean for weight, mean in self._with(self.weight_means, weights)),
            tuple(bias + mean for bias, mean in self._with(self.bias_means, biases)),
        )

    def _with(self, scalars: Tensor, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Each layer's tensor, and its scalar."""
        if len(tensors) < len(scalars):
            scalars = torch.cat([scalars[: len(tensors) - 1], scalars[-1:]])
        return zip(tensors, scalars.unbind(), strict=True)

    def _rows(self, num_layers: int) -> Tensor:
        """[num_layers] long, the index of the scalars of each layer of a network."""
        every = torch.arange(len(self.weight_scales), device=self.weight_scales.device)
        return torch.cat([every[: num_layers - 1], every[-1:]])


class StatisticsNormalization(nn.Module):
    """Standardises each statistic over the training split, and clips it: clip((x - mean) / deviation, -5, 5).

    The result is 0 for statistics that a network does not have, which are NaN. Statistics that hardly differ between
    networks (by less than 1e-4) are not divided, so that their rounding errors stay small. Means and deviations are
    buffers, 0 and 1 until `fit`, and travel with checkpoints.

    Args:
        num_statistics: S, of each network.
    """

    means: Tensor
    deviations: Tensor

    def __init__(self, num_statistics: int) -> None:
        super().__init__()
        self.register_buffer("means", torch.zeros(num_statistics))
        self.register_buffer("deviations", torch.ones(num_statistics))

    @torch.no_grad()
    def fit(self, statistics: Tensor) -> None:
        """Sets means and deviations from those of all training networks, [B, S]."""
        values = statistics.double()
        means = values.nanmean(0).nan_to_num()
        deviations = (values - means).square().nanmean(0).nan_to_num().sqrt()
        self.means.copy_(means)
        self.deviations.copy_(torch.where(deviations > _LEAST_DEVIATION, deviations, 1.0))

    def forward(self, statistics: Tensor) -> Tensor:
        """[B, S] -> [B, S]."""
        values = (statistics - self.means) / self.deviations
        return torch.where(values.isnan(), 0, values.clamp(-_LARGEST_STATISTIC, _LARGEST_STATISTIC))


class FeatureBatchNorm(nn.BatchNorm1d):
    """Batch normalisation of each feature over all positions of all networks (Ioffe & Szegedy, 2015).

    While training, a batch with a single row, which has no variance, is normalised by the running statistics.

    Args:
        num_features: f.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., k f] -> the same: k positions of f features each."""
        rows = x.reshape(-1, self.num_features)
        if len(rows) > 1 or not self.training:
            return super().forward(rows).view(x.shape)
        mean, variance = self.running_mean, self.running_var
        return nn.functional.batch_norm(rows, mean, variance, self.weight, self.bias, eps=self.eps).view(x.shape)
