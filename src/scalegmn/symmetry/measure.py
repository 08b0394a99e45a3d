"""Is a model exactly as symmetric as it claims? Numbers first, assertions second."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from scalegmn.networks import NetParams
from scalegmn.symmetry.groups import GroupElement


def spread(outputs: Tensor) -> float:
    """How much the outputs [B, ...] differ between networks: the root mean square distance from their mean."""
    return (outputs - outputs.mean(0)).square().mean().sqrt().item()


def relative_change(moved: Tensor, outputs: Tensor) -> float:
    """The largest |moved - outputs| relative to the spread between networks; NaN and infinities stay visible."""
    change = (moved - outputs).abs().max().cpu()
    return (change / torch.tensor(spread(outputs), dtype=change.dtype)).item()


@torch.no_grad()
def invariance_error(
    model: Callable[[NetParams], Tensor],
    params: NetParams,
    generator: torch.Generator,
    permute: bool = True,
    scale: bool = True,
    num_draws: int = 3,
) -> float:
    """The largest |f(g x) - f(x)| over random group elements g, relative to the spread between networks.

    Args:
        model: networks -> [B, ...]; a module is measured in evaluation mode.
        params: at least two different networks.
        generator: draws the group elements.
        permute: permute neurons.
        scale: rescale neurons by what their activations admit.
        num_draws: group elements per network.
    """
    training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()  # dropout is not what is measured
    outputs = model(params)
    moved = [
        model(GroupElement.sample(params, generator, permute=permute, scale=scale).act(params))
        for _ in range(num_draws)
    ]
    if isinstance(model, nn.Module):
        model.train(training)
    return relative_change(torch.stack(moved), outputs)


def assert_invariant(
    model: Callable[[NetParams], Tensor],
    params: NetParams,
    generator: torch.Generator,
    tolerance: float = 1e-9,
    permute: bool = True,
    scale: bool = True,
) -> None:
    """Raises AssertionError unless `invariance_error` is at most `tolerance` (meant for float64)."""
    error = invariance_error(model, params, generator, permute, scale)
    assert error <= tolerance, f"output moves by {error:.1e} of the spread between networks, expected {tolerance:.0e}"
