"""The test accuracy of one's own network, from its weights (`predicting_generalization.py --predict`)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from scalegmn.config import ScriptConfig
from scalegmn.data.inr_zoos import read_network
from scalegmn.spec import MIXED, NetParams, NetSpec
from scalegmn.symmetry.canonicalize import canonicalize
from scalegmn.tasks.generalization import weight_sizes
from scalegmn.trained import load_model, run_data


@dataclass(frozen=True)
class PredictConfig(ScriptConfig):
    """Train a model that predicts the test accuracy of networks, or predict with one that has been trained."""

    checkpoint: str | None = None
    """Run folder of a trained model, for --predict."""

    predict: str | None = None
    """A network as a .pth or .safetensors state dict: predict its test accuracy instead of training. Where the model
    knows several activations, --data.activation_function says which one it has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.checkpoint is None) != (self.predict is None):
            raise ValueError("--checkpoint RUN and --predict FILE belong together: give both or none")
        self.model_config.check_output("vector", "predicting generalisation", out_dim=1)


@torch.no_grad()
def predict_file(config: PredictConfig) -> None:
    """Prints the predicted test accuracy of `config.predict`, and where it lies among the training networks'; warns on
    stderr where the network is unlike them.

    Raises:
        ValueError: the run or the file is missing or refused, or the model cannot read such networks.
    """
    run, path = Path(config.checkpoint), Path(config.predict)
    data = run_data(run)
    if "log10_weights" not in data:
        raise ValueError(f"--checkpoint: {run} was trained for another task")
    expected = _of_activation(NetSpec.from_dict(data["spec"]), config.data.activation_function)
    tensors, _ = read_network(path)
    batch = [tensor[None].float() for tensor in tensors]
    try:
        params = NetParams.from_tensors(batch[::2], batch[1::2], expected.layers[0].activation, expected.layers[0].w0)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    model = load_model(config.model_config, run, params.spec)
    read = canonicalize(params, config.data.canonicalize if config.data.switch_to_canon else ())
    accuracy = model(read).sigmoid().item()
    for difference in differences(params, expected, data["architectures"], data["log10_weights"]):
        print(f"warning: {path}: {difference}; the prediction may be far off", file=sys.stderr)
    share = np.searchsorted(data["test_accuracy"], accuracy).clip(0, 100)
    print(f"{path}: predicted test accuracy {accuracy:.1%}, higher than that of {share} % of the training networks")


def differences(
    params: NetParams, expected: NetSpec, architectures: int, log10_weights: Sequence[Sequence[float] | None]
) -> list[str]:
    """How a network is unlike those that a model was trained on.

    Args:
        params: the network, a batch of one.
        expected: the architecture of the training networks, or what covers them.
        architectures: how many they have.
        log10_weights: the least and the largest of their `weight_sizes`, per layer of `expected`.
    """
    found, spec = [], params.spec
    if architectures == 1 and spec != expected:
        found.append(f"is a {spec}, the training networks are {expected}")
    if architectures > 1 and NetSpec.covering([expected, spec]) != expected:
        found.append(f"is a {spec}, the training networks are of {architectures:,} architectures within {expected}")
    ranges = [*log10_weights[: spec.num_layers - 1], log10_weights[-1]]
    for layer, (size, trained) in enumerate(zip(weight_sizes(params)[0].tolist(), ranges, strict=True)):
        if trained is None:
            found.append(f"layer {layer} is there, the training networks have no such layer")
        elif not trained[0] - 0.01 <= size <= trained[1] + 0.01:  # canonical relu layers all have the same, but rounded
            between = " to ".join(f"{10**value:.2g}" for value in trained)
            found.append(f"layer {layer} has weights of size {10**size:.2g}, the training networks {between}")
    return found


def _of_activation(spec: NetSpec, name: str | None) -> NetSpec:
    """The training networks' architecture with the activation that the file's network has.

    Raises:
        ValueError: `name` is missing, or is not theirs.
    """
    own = spec.layers[0].activation
    if own == MIXED and name is None:
        raise ValueError("data.activation_function: found null, but the model knows several; say which the network has")
    if own not in (MIXED, name) and name is not None:
        raise ValueError(f"data.activation_function: found {name}, but the model was trained on {own} networks")
    return spec.with_activation(name or own)
