"""Checkpoints of the published ScaleGMN code, loaded into this package's model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from scalegmn.interop.published_configs import translate_config
from scalegmn.models.scalegmn import ScaleGMN
from scalegmn.networks import LayerSpec, NetSpec

_ACTIVATION = {"sign": "tanh", "scale": "relu", "hetero": "hetero", "permutation": "tanh"}
"""Symmetry -> an activation that has it: a model depends on the input networks' symmetry, not on their activation."""


_RENAMES = [
    (r"^construct_graph\.proj_bias\.", "node_linear."),
    (r"^construct_graph\.proj_weight\.", "edge_linear."),
    (r"^positional_embeddings\.pos_embed$", "node_positions.table"),
    (r"^positional_embeddings_edge\.pos_embed$", "edge_positions.table"),
    (r"^positional_embeddings\.init_fn\.", "node_position_net."),
    (r"^positional_embeddings_edge\.init_fn\.", "edge_position_net."),
    (r"^gnn\.skip_layers\.(\d+)\.", r"layers.\1.skip."),
    (r"^gnn\.fw_layers\.(\d+)\.update_node_feats_fn\.", r"layers.\1.update."),
    (r"^gnn\.update_node_feats_fn\.(\d+)\.", r"layers.\1.update."),
    (r"^gnn\.fw_layers\.(\d+)\.update_edge_attr_fn\.", r"layers.\1.edge_update."),
    (r"^gnn\.fw_update_edge_attr_fn\.(\d+)\.", r"layers.\1.edge_update."),
    (r"^gnn\.bw_update_edge_attr_fn\.(\d+)\.", r"layers.\1.backward_edge_update."),
    (r"^gnn\.fw_layers\.(\d+)\.w_h\.", r"layers.\1.update.parts.0."),
    (r"^gnn\.fw_layers\.(\d+)\.w_msg\.", r"layers.\1.update.parts.1."),
    (r"^gnn\.fw_layers\.(\d+)\.", r"layers.\1.forward_message."),
    (r"^gnn\.bw_layers\.(\d+)\.", r"layers.\1.backward_message."),
    (r"\.message_fn\.rho\.", ".mlp."),
    (r"\.message_fn\.", ".net."),
    (r"\.update\.rho\.", ".update.mlp."),
    (r"\.update\.W\.", ".update.linear."),
    (r"\.w_v\.", ".node_linear."),
    (r"\.w_e\.", ".edge_linear."),
    (r"\.eq_layers\.(\d+)\.", r".layers.\1.hidden."),
    (r"\.eq_layers_in\.(\d+)\.rho\.", r".layers.\1.input.mlp."),
    (r"\.eq_layers_last\.(\d+)\.rho\.", r".layers.\1.output.mlp."),
    (r"\.eq_layers_in\.(\d+)\.", r".layers.\1.input."),
    (r"\.eq_layers_last\.(\d+)\.", r".layers.\1.output."),
    (r"\.skip_layers\.(\d+)\.", r".skips.\1."),
    (r"(hidden|input|output)\.W\.", r"\1.linear."),
    (r"edge_update\.W\.", "edge_update.linear."),
    (r"\.g\.phi_in\.", ".factor.input.mlp."),
    (r"\.g\.phi_last\.", ".factor.output.mlp."),
    (r"^gnn\.readout\.(g1|g_sign|g_scale)\.", r"readout.invariant_layer.hidden.\1."),
    (r"\.g\.(g1|g_sign|g_scale)\.", r".factor.hidden.\1."),
    (r"edge_update\.(g1|g_sign|g_scale)\.rho\.", r"edge_update.invariant.\1.rho."),
    (r"hidden\.(g1|g_sign|g_scale)\.rho\.", r"hidden.\1.invariant.rho."),
    (r"\.g1\.", "."),
    (r"\.g_(sign|scale)\.", r".\1."),
    (r"^gnn\.project_last\.", "readout.output_projection."),
    (r"^gnn\.project_first\.", "readout.input_projection."),
    (r"^gnn\.readout\.rho\.", "readout.mlp."),
    (r"^gnn\.readout\.(local|global)_mlp\.", r"readout.\1_mlp."),
    (r"\.fc\.(\d+)\.", r".linears.\1."),
    (r"\.ln\.(\d+)\.", r".norms.\1."),
]
"""Patterns of published parameter names and what replaces them, applied in turn; `hidden`, `input` and `output` are
roles, which `_branches` replaces by branches."""

_UNUSED = r"^gnn\.readout\.(phi|aggr)\."
"""Published parameters that no output depends on, besides those of branches and edges that nothing reads."""

_COMBINED = r"^(weight|bias)_scale\.|^positional_embeddings(_edge)?\.(final_linear\.weight|linears)$"
"""Published parameters of which several become one parameter of our model."""


def _branches(name: str, model: ScaleGMN) -> Iterator[str]:
    """The names in our model of a parameter with a translated name: one per branch for the role, none where the layer
    has no such module."""
    parts = re.split(r"\.(hidden|input|output)\.", name, maxsplit=1)
    if len(parts) == 1:
        yield name
        return
    head, role, rest = parts
    try:
        module = model.get_submodule(head)
    except AttributeError:  # the layer needs no such module
        return
    index: Any = getattr(module, "index", None)
    if index is None:  # one module for all roles
        if role == "hidden":
            yield from _branches(f"{head}.{rest}", model)
        return
    options = model.config.message if ".net." in name else model.config.update
    if "_position_net." in name:
        options = model.config.position_net
    shared = role == "input" and options.io_branches == 1  # published under `input`
    roles = ["input", "output"] if shared else [role]
    for branch in {index[name] for name in roles if name in index}:
        yield from _branches(f"{head}.branches.{branch}.{rest}", model)


def load_published_checkpoint(scalegmn_args: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> ScaleGMN:
    """A ScaleGMN with the parameters of a published checkpoint, in evaluation mode and the checkpoint's dtype.

    The model computes what the published one does, which keeps some symmetries only approximately (`exact=False` in
    `translate_config`).

    Args:
        scalegmn_args: the `scalegmn_args` section of the published configuration, with its `layer_layout`.
        state_dict: the published model's state dict. Parameters that no output depends on are ignored.

    Raises:
        ValueError: an option is not supported, a parameter is missing, unknown or of the wrong shape.
    """
    config = translate_config(scalegmn_args, exact=False)
    model = config.build(_input_spec(scalegmn_args)).to(next(iter(state_dict.values())).dtype)
    expected = model.state_dict()
    loaded = _fused_scales(state_dict) if config.output == "parameters" else {}
    loaded |= _position_maps(state_dict)
    for published, tensor in state_dict.items():
        name = published
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        if config.readout == "full_graph" and config.symmetry != "permutation":
            name = name.replace("readout.global_mlp.", "readout.mlp.")
        if name == published and not re.match(f"{_UNUSED}|{_COMBINED}", published):
            raise ValueError(f"the checkpoint has a parameter {published}, which no published ScaleGMN has")
        loaded |= dict.fromkeys(_branches(name, model), tensor)
    missing = sorted(set(expected) - set(loaded))
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} parameters that the configuration asks for, first {missing[0]}"
        )
    for name, tensor in expected.items():
        if loaded[name].shape != tensor.shape:
            raise ValueError(
                f"{name}: shape {tuple(loaded[name].shape)}, expected {tuple(tensor.shape)} as in the configuration"
            )
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(loaded[name])
    return model.eval()


def _input_spec(scalegmn_args: Mapping[str, Any]) -> NetSpec:
    """Networks of the published layout: convolutions with the largest kernel and a linear layer for CNN zoos."""
    layout = scalegmn_args["layer_layout"]
    activation = _ACTIVATION[scalegmn_args["symmetry"]]
    if "_max_kernel_height" not in scalegmn_args:
        return NetSpec.mlp(layout, activation)
    kernel = (scalegmn_args["_max_kernel_height"], scalegmn_args["_max_kernel_width"])
    hidden = pairwise(layout[:-1])
    return NetSpec((*(LayerSpec(i, o, kernel, activation) for i, o in hidden), LayerSpec(layout[-2], layout[-1])))


def _fused_scales(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors of changes: one parameter per layer in published checkpoints, one tensor for all layers in ours."""
    return {
        f"{kind}_scales": torch.stack([state_dict[f"{kind}_scale.{index}"].reshape(()) for index in range(count)])
        for kind in ("weight", "bias")
        if (count := sum(name.startswith(f"{kind}_scale.") for name in state_dict))
    }


def _position_maps(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The maps after positional embeddings: a shared one, one per type, or both, one after the other."""
    maps = {}
    for kind, published in (("node", "positional_embeddings"), ("edge", "positional_embeddings_edge")):
        shared = state_dict.get(f"{published}.final_linear.weight")
        typed = state_dict.get(f"{published}.linears")
        if f"{published}.init_fn.eq_layers.0.W.weight" in state_dict:  # then the shared one is not used
            shared = None
        if typed is not None:
            maps[f"{kind}_position_map.table"] = typed if shared is None else typed @ shared
        elif shared is not None:
            maps[f"{kind}_position_map.table"] = shared[None]
    return maps
