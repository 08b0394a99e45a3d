"""Heads of metanetworks: what a model gives for each input network.

A head knows which outputs a task may ask for and holds no tensors. The learned factors of `ParametersHead` are
parameters of the model itself, so that checkpoints name them `weight_scales` and `bias_scales`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from scalegmn.networks import NetParams


@dataclass(frozen=True)
class VectorHead:
    """An invariant vector for each of B networks, [B, out_dim].

    Args:
        out_dim: numbers per network.
    """

    output: ClassVar[str] = "vector"

    out_dim: int

    def add_parameters(self, model: nn.Module, num_layers: int) -> None:
        """Adds nothing: a model's readout holds all parameters."""

    def problems(self, output: str, task: str, out_dim: int | None) -> list[str]:
        """One sentence per requirement of a task that is not met; see `ModelConfig.check_output`."""
        problems = [] if output == self.output else [f"output: found {self.output}, but {task} needs {output}"]
        if out_dim is not None and out_dim != self.out_dim:
            problems.append(f"out_dim: found {self.out_dim}, but {task} needs {out_dim}")
        return problems


@dataclass(frozen=True)
class ParametersHead:
    """k changes of every weight and bias, equivariant: Delta_i W_l = alpha_l w_l,i and Delta_i b_l = beta_l u_l,i.

    The model computes w_l,i and u_l,i, i = 1..k, in the shapes of W_l and b_l; alpha_l and beta_l are learned factors,
    one per layer. With k > 1 what a network does after the change is the mean of what its k changed networks do (output
    capacity expansion).

    Args:
        initial_scale: alpha_l and beta_l at the start; None: no factors.
        heads: k.
    """

    output: ClassVar[str] = "parameters"

    initial_scale: float | None
    heads: int

    def add_parameters(self, model: nn.Module, num_layers: int) -> None:
        """Adds alpha as `weight_scales` and beta as `bias_scales`, [L] each, to the model."""
        if self.initial_scale is not None:
            model.weight_scales = nn.Parameter(torch.full((num_layers,), self.initial_scale))
            model.bias_scales = nn.Parameter(torch.full((num_layers,), self.initial_scale))

    def changes(self, model: nn.Module, of_heads: Sequence[NetParams]) -> NetParams:
        """The changes of B networks, each layer times its factor: B k of them, those of one network side by side.

        Args:
            model: has the factors.
            of_heads: w and u of each head, B networks.
        """
        changes = of_heads[0] if self.heads == 1 else NetParams.interleave(of_heads)
        if self.initial_scale is None:
            return changes
        return changes.replace(
            weights=_scaled(changes.weights, model.weight_scales),
            biases=_scaled(changes.biases, model.bias_scales),
        )

    def problems(self, output: str, task: str, out_dim: int | None) -> list[str]:
        """One sentence per requirement of a task that is not met; see `ModelConfig.check_output`."""
        return [] if output == self.output else [f"output: found {self.output}, but {task} needs {output}"]


Head = VectorHead | ParametersHead


def changes_by_head(
    params: NetParams, weights: Sequence[Tensor], biases: Sequence[Tensor], heads: int
) -> list[NetParams]:
    """The k changes w_i and u_i of B networks, from one tensor per layer that holds those of all heads.

    Args:
        params: the networks.
        weights: per layer [B, n_l, n_{l-1}, k F_l] or [B, n_l n_{l-1}, k F_l]: the F_l kernel values of the first head,
            then those of the second.
        biases: per layer [B, n_l, k].
        heads: k.
    """
    by_layer = list(zip(weights, params.weights, strict=True))
    return [
        params.replace(
            weights=tuple(new.chunk(heads, dim=-1)[head].reshape(old.shape) for new, old in by_layer),
            biases=tuple(new[..., head] for new in biases),
        )
        for head in range(heads)
    ]


def _scaled(tensors: tuple[Tensor, ...], factors: Tensor | nn.Module) -> tuple[Tensor, ...]:
    """Each layer's tensor times its factor."""
    assert isinstance(factors, Tensor)
    return tuple(tensor * factor for tensor, factor in zip(tensors, factors, strict=True))
