"""Trained optimisers for modules: `scalegmn.load_optimizer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalegmn.experiments.optimizer_run import OptimizerRunConfig, load_trained_optimizer
from scalegmn.interop.torch_modules.layers import ReadLayer
from scalegmn.interop.torch_modules.parameters import named_tensors, read_parameters, written_tensors
from scalegmn.interop.torch_modules.program import ExampleInput
from scalegmn.interop.torch_modules.reader import trace_module
from scalegmn.networks import NetParams
from scalegmn.optimizers.coordinates import Coordinates
from scalegmn.optimizers.features import OptimizerState
from scalegmn.optimizers.learned import LearnedOptimizer


class ModuleOptimizer(torch.optim.Optimizer):
    """A learned optimiser of one module, used like those of PyTorch: `zero_grad()`, backward, `step()`.

    Args:
        learned: the learned optimiser.
        module: any module that `scalegmn.from_module` reads and the optimiser can train: `ff`, `mlp_lopt` and `lstm`
            read all, networks on graphs chains of layers.
        example_input: the input that the module is called with, as in `scalegmn.from_module`.

    Raises:
        ValueError: the module cannot be read, or the optimiser does not train networks of its kind.
    """

    def __init__(self, learned: LearnedOptimizer, module: nn.Module, example_input: ExampleInput) -> None:
        self.learned, self.module = learned, module
        self._layers, self._spec = trace_module(module, example_input, None, is_strict=False)
        self._coordinates = Coordinates(self._spec)
        super().__init__(module.parameters(), {})
        params = self._params(named_tensors(module))
        self._change(params, params.map(torch.zeros_like))  # raises where it does not train such networks

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Changes the parameters that have gradients; frozen ones and buffers stay as they are.

        Args:
            closure: computes the loss and its gradients first.

        Raises:
            ValueError: a parameter or gradient is not finite, or layers share a parameter, whose uses the optimiser
                would change differently.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        tensors = named_tensors(self.module)
        params = self._params(tensors)
        change, state = self._change(params, _gradients(tensors, self._layers, params))
        new = params.unflatten(params.flatten() + change)
        self.state[self._first] = dict(state._asdict())
        written = written_tensors(_kept(new, params, self._layers), tensors, self._layers, self._spec)
        for name, tensor in tensors.items():
            if tensor.grad is not None:
                tensor.copy_(written[name])
        return loss

    def _params(self, tensors: Mapping[str, Tensor]) -> NetParams:
        """The module's parameters as a network, in the optimiser's precision."""
        return read_parameters(tensors, self._layers, self._spec).to(next(self.learned.parameters()))

    @torch.no_grad()
    def _change(self, params: NetParams, gradients: NetParams) -> tuple[Tensor, OptimizerState]:
        """What is added to the parameters in a row [1, P], and what is remembered then."""
        flat = params.flatten()
        inputs, state = self.learned.inputs(params, flat, gradients.flatten(), self._state(flat))
        change: Tensor = self.learned(inputs, self._coordinates)
        return change, state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Takes the module's parameters, once.

        Raises:
            ValueError: further ones are added.
        """
        if self.param_groups:
            raise ValueError(
                "param_group: a learned optimiser trains one module, found further parameters; make another"
            )
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict()` gave, in its own precision: modules of bfloat16 do not round it."""
        super().load_state_dict(state_dict)
        device = next(self.learned.parameters()).device
        stored = state_dict["state"].get(0, {})
        self.state[self._first] = {name: value.to(device, copy=True) for name, value in stored.items()}

    @property
    def _first(self) -> Tensor:
        """The parameter whose state is that of all."""
        first: Tensor = self.param_groups[0]["params"][0]
        return first

    def _state(self, flat: Tensor) -> OptimizerState:
        """What the optimiser remembers."""
        stored = self.state.get(self._first)
        if not stored:
            return self.learned.features.start(flat)
        return OptimizerState(*(stored[name] for name in OptimizerState._fields))


def _gradients(tensors: Mapping[str, Tensor], layers: Sequence[ReadLayer], params: NetParams) -> NetParams:
    """The gradients of all parameters in their places; 0 where there are none."""
    of_tensors = {
        name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for name, tensor in tensors.items()
    }
    read = read_parameters(of_tensors, layers, params.spec).to(params.biases[0])

    def scaled(kind: str, values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        factors = []
        for layer, value in zip(layers, values, strict=True):
            elements = getattr(layer, kind)
            # the parameter's value here is its own times a scale, and what was read above is multiplied by it, too
            factors.append(torch.zeros_like(value) if elements is None else value / elements.scale**2)
        return tuple(factors)

    return params.replace(weights=scaled("weight", read.weights), biases=scaled("bias", read.biases))


def _kept(new: NetParams, old: NetParams, layers: Sequence[ReadLayer]) -> NetParams:
    """New parameters, with the old ones where the module has none."""
    return new.replace(
        weights=tuple(
            before if layer.weight is None else after
            for layer, after, before in zip(layers, new.weights, old.weights, strict=True)
        ),
        biases=tuple(
            before if layer.bias is None else after
            for layer, after, before in zip(layers, new.biases, old.biases, strict=True)
        ),
    )


class TrainedOptimizer:
    """The learned optimiser of a finished run: `trained(module, example_input)` is a `ModuleOptimizer`.

    Attributes:
        learned: the optimiser itself.
        config: the run's configuration.
    """

    def __init__(self, learned: LearnedOptimizer, config: OptimizerRunConfig) -> None:
        self.learned, self.config = learned, config

    def __call__(self, module: nn.Module, example_input: ExampleInput) -> ModuleOptimizer:
        """For one module."""
        return ModuleOptimizer(self.learned, module, example_input)


def load_optimizer(run: str | Path) -> TrainedOptimizer:
    """The learned optimiser of a finished run of `scalegmn train optimizer`.

    Raises:
        ValueError: the folder is none.
    """
    return TrainedOptimizer(*load_trained_optimizer(run))
