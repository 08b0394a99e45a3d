"""Parameters as parts of one tensor: small models would spend more time on many small calls than on numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

ALIGNMENT = 16
"""Parts start at multiples of so many numbers."""


class FlatParameters:
    """Parameters that become parts of one tensor, and gradients that are parts of another: one call clips, sums or
    updates all of them. A parameter that a loss does not depend on has a gradient of zeros.

    Args:
        parameters: of one type, on one device; those that need no gradient stay as they are.

    Attributes:
        tensor: what an optimiser changes; its gradient is always there.

    Raises:
        ValueError: parameters are of several types or devices.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parts: dict[int, tuple[int, nn.Parameter]] = {}
        size, kinds = 0, set()
        for index, parameter in enumerate(parameters):
            if parameter.requires_grad:
                self._parts[index] = size, parameter
                size += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
                kinds.add((parameter.dtype, parameter.device))
        if len(kinds) > 1:
            raise ValueError(f"found parameters of types and devices {sorted(map(str, kinds))}, expected one of each")
        dtype, device = kinds.pop() if kinds else (None, None)
        self.tensor = nn.Parameter(torch.zeros(size, dtype=dtype, device=device))
        self.tensor.grad = torch.zeros_like(self.tensor)
        parts, gradients = (self._split(whole) for whole in (self.tensor.data, self.tensor.grad))
        for index, (_, parameter) in self._parts.items():
            parts[index].copy_(parameter.data)
            parameter.data, parameter.grad = parts[index], gradients[index]

    def _split(self, whole: Tensor) -> dict[int, Tensor]:
        """Each parameter's part of a tensor, by its number."""
        return {
            index: whole[start : start + parameter.numel()].view_as(parameter)
            for index, (start, parameter) in self._parts.items()
        }

    def split_state(self, state: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
        """An optimiser's state of the one tensor, as it would be of each parameter, by number."""
        result: dict[int, dict[str, Tensor]] = {index: {} for index in self._parts}
        for name, tensor in state.items():
            parts = self._split(tensor) if tensor.shape == self.tensor.shape else dict.fromkeys(self._parts, tensor)
            for index, part in parts.items():
                result[index][name] = part.clone()
        return result

    def join_states(self, states: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The opposite of `split_state`; zeros for parameters without a state."""
        joined: dict[str, Tensor] = {}
        for index, state in states.items():
            for name, tensor in state.items():
                if tensor.shape == self._parts[index][1].shape and name != "step":
                    whole = joined.setdefault(name, torch.zeros_like(self.tensor.data))
                    self._split(whole)[index].copy_(tensor)
                else:
                    joined[name] = tensor
        return joined
