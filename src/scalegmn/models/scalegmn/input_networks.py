"""Which networks a model reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scalegmn.models.scalegmn.receptive_field import skips_hidden_layers
from scalegmn.networks import HETERO, NetSpec
from scalegmn.networks.scalar_groups import symmetry_word
from scalegmn.nn.probes import check_images

if TYPE_CHECKING:
    from scalegmn.models.scalegmn.config import ScaleGMNConfig
    from scalegmn.models.scalegmn.model import ScaleGMN


def check_spec(model: ScaleGMN, spec: NetSpec) -> None:
    """Raises ValueError unless a model can read networks of `spec`."""
    own, depth = model.spec, spec.num_hidden_layers
    least = 0 if model.config.max_hidden_layers else model.max_hidden
    if (
        (spec.layout[0], spec.layout[-1]) != (own.layout[0], own.layout[-1])
        or not least <= depth <= model.max_hidden
        or max(a - b for a, b in zip(spec.kernel, own.kernel, strict=True)) > 0
        or spec.num_places > own.num_places
    ):
        raise ValueError(
            f"the model was built for networks from {own.layout[0]} to {own.layout[-1]}, of {least} to "
            f"{model.max_hidden} hidden layers (max_hidden_layers), kernels up to "
            f"{own.kernel[0]}x{own.kernel[1]} and pinned layers of up to {own.num_places} neurons, found {spec}"
        )
    if model.readout is None and (depth, spec.kernel) != (own.num_layers - 1, own.kernel):
        raise ValueError(f"{model.config.section}.output: the model was built for changes of {own}, found {spec}")
    if model.config.num_probes and spec.is_cnn != own.is_cnn:
        kind = "images" if own.is_cnn else "points"
        raise ValueError(f"{model.config.section}.num_probes: the probes are {kind}, of {own}, found {spec}")
    reads_outputs_alone = model.readout is not None and not model.bidirectional and model.config.readout == "last_layer"
    if reads_outputs_alone and skips_hidden_layers(spec) and not skips_hidden_layers(own):
        raise ValueError(
            f"{model.config.section}.readout: the model was built for networks whose output layer does not read the "
            f"input, found {spec}; use full_graph"
        )
    if spec.residuals and not own.residuals:
        raise ValueError(f"the model was built for networks without residual connections, found {spec}")
    check_fit(model.config, spec)


def check_fit(config: ScaleGMNConfig, spec: NetSpec) -> None:
    """Raises ValueError when the symmetry is not one of the networks'."""
    if config.width_transfer and not spec.is_chain:
        raise ValueError(f"{config.section}.width_transfer: found True, expected False for {spec}, no chain")
    if config.num_probes:
        if not spec.is_chain:
            raise ValueError(f"{config.section}.num_probes: found {config.num_probes}, expected 0 for {spec}, no chain")
        check_images(config.probe_images, spec, f"{config.section}.probe_images")
        if config.branch.answers and spec.layout[-1] == 1:
            problem = f"found True, expected False for {spec}, which has one output, and softmax needs several"
            raise ValueError(f"{config.section}.branch.answers: {problem}")
    if config.equal_outputs and spec.num_places:
        raise ValueError(f"{config.section}.equal_outputs: found True, expected False for {spec}, with pinned neurons")
    found = {symmetry_word(spec.class_symmetry(channels)) for channels in spec.scaling_classes}
    if config.symmetry not in ("permutation", HETERO) and not found <= {config.symmetry}:
        (fitting,) = found if len(found) == 1 else {HETERO}
        raise ValueError(
            f"scalegmn_args.symmetry: {config.symmetry} does not hold for {spec}, whose activations admit "
            f"{', '.join(sorted(found))}; use {fitting}"
        )
