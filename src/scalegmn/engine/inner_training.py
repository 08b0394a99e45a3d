"""Training of relu networks under a learned optimiser that reads each parameter by itself, by `inner_training.cpp`.

Shape letters: B networks, P parameters, T steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scalegmn.engine import native
from scalegmn.engine.coordinate_steps import CoordinateOptimizer, State, in_rows
from scalegmn.engine.relu_classifiers import Classifiers


def train(
    optimizer: CoordinateOptimizer, classifiers: Classifiers, state: State, max_loss: float
) -> tuple[State, Tensor, Tensor]:
    """T steps of B networks, each on its own: all of one network's, while it is in cache.

    A network diverges, and takes no more steps, where its loss is not below `max_loss` or anything is not finite.

    Args:
        optimizer: of T steps.
        classifiers: of T steps.
        state: before the first one, which is used up: momenta and moments after the last take its place in memory.
        max_loss: of networks that have not diverged; may be infinite.

    Returns:
        The state, losses [B, T] before each step, infinite from where a network diverged, and whether it did, [B].

    Raises:
        ValueError: shapes do not fit.
    """
    library = native.library()
    assert library is not None
    words, _kept = optimizer.words(state)
    more, _also_kept = classifiers.words()
    num_steps, num_networks = optimizer.constants.shape[:2]
    found = (*classifiers.rows.shape[:2], classifiers.num_parameters)
    if found != (expected := (num_steps, num_networks, state.parameters.shape[1])):
        raise ValueError(f"found images for {found} steps, networks and parameters, expected {expected}")
    after = in_rows(state)
    after = after._replace(parameters=after.parameters.clone())
    losses = torch.full((num_networks, num_steps), torch.inf, dtype=torch.float32)
    num_taken, limit = torch.empty(num_networks, dtype=torch.long), torch.tensor(max_loss, dtype=torch.float32)
    words += [*more, *(tensor.data_ptr() for tensor in (*after, losses, num_taken)), num_steps, limit.data_ptr()]
    library.inner_training(native.words([*words, torch.get_num_threads()]))
    return after._replace(momenta=after.momenta.mT), losses, num_taken < num_steps
