"""The published ScaleGMN code's configuration keys and parameter names, translated into ours."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from scalegmn.models.scalegmn import EquivariantNetConfig, ScaleGMN, ScaleGMNConfig
from scalegmn.spec import NetSpec

_UNSUPPORTED = {
    "equivariant": False,
    "concat_mlp_directions": False,
    "positional_encodings.sum_on_io": True,
    "positional_encodings.final_linear_pos_embed": False,
    "positional_encodings.sum_pos_enc": False,
    "positional_encodings.po_as_different_linear": False,
    "positional_encodings.equiv_net": False,
    "gnn_args.message_fn_layers": 1,
    "gnn_args.update_node_feats_fn_layers": 1,
    "gnn_args.update_edge_attr": True,
    "gnn_args.dropout_all": False,
    "gnn_args.update_as_act": False,
    "gnn_args.mlp_on_io": False,
    "gnn_args.layer_msg_equiv_on_hidden": False,
    "gnn_args.layer_upd_equiv_on_hidden": False,
    "gnn_args.aggregator": "add",
    "gnn_args.sign_symmetrization": True,
    "mlp_args.final_activation": "identity",
    "mlp_args.batch_norm": False,
    "mlp_args.skip": False,
    "mlp_args.bias": True,
}
"""Published key -> the one value that our models cover so far."""


def translate_config(scalegmn_args: Mapping[str, Any]) -> ScaleGMNConfig:
    """Our configuration for a published `scalegmn_args` section.

    Raises:
        ValueError: it uses an option that is not supported; names all of them.
    """
    problems = []
    for key, supported in _UNSUPPORTED.items():
        section, _, name = key.rpartition(".")
        value = (scalegmn_args[section] if section else scalegmn_args).get(name, supported)
        if value != supported:
            problems.append(f"scalegmn_args.{key}: {value!r} is not supported, only {supported!r}")
    if problems:
        raise ValueError("; ".join(problems))
    gnn, mlp, readout = (scalegmn_args[key] for key in ("gnn_args", "mlp_args", "readout_args"))

    def net(prefix: str) -> EquivariantNetConfig:
        branches = gnn[f"{prefix}_num_mlps"]
        separate = gnn[f"{prefix}_equiv_on_hidden"] and branches > 1
        return EquivariantNetConfig(
            io="factor" if separate else "same",
            io_branches=branches - 1 if separate else 1,
            positions=gnn[f"pos_embed_{prefix}"],
        )

    return ScaleGMNConfig(
        symmetry=scalegmn_args["symmetry"],
        direction=scalegmn_args["direction"],
        readout=scalegmn_args["readout_range"],
        num_layers=scalegmn_args["num_layers"],
        hidden_dim=scalegmn_args["d_hid"],
        mlp_dims=tuple(mlp["d_k"]),
        mlp_activation=mlp["activation"],
        mlp_layer_norm=mlp["layer_norm"],
        readout_dim=readout["d_rho"],
        out_dim=readout["d_out"],
        normalize=False,
        node_positions=scalegmn_args["node_pos_embed"],
        edge_positions=scalegmn_args["edge_pos_embed"],
        skip_connections=scalegmn_args["gnn_skip_connections"],
        dropout=gnn["dropout"],
        message=net("msg"),
        update=net("upd"),
    )


_RENAMES = [
    (r"^construct_graph\.proj_bias\.", "node_linear."),
    (r"^construct_graph\.proj_weight\.", "edge_linear."),
    (r"^positional_embeddings\.pos_embed$", "node_positions.table"),
    (r"^positional_embeddings_edge\.pos_embed$", "edge_positions.table"),
    (r"^gnn\.skip_layers\.(\d+)\.", r"layers.\1.skip."),
    (r"^gnn\.fw_layers\.(\d+)\.update_node_feats_fn\.", r"layers.\1.update."),
    (r"^gnn\.update_node_feats_fn\.(\d+)\.", r"layers.\1.update."),
    (r"^gnn\.fw_layers\.(\d+)\.update_edge_attr_fn\.", r"layers.\1.edge_update."),
    (r"^gnn\.fw_update_edge_attr_fn\.(\d+)\.", r"layers.\1.edge_update."),
    (r"^gnn\.fw_layers\.(\d+)\.", r"layers.\1.forward_message."),
    (r"^gnn\.bw_layers\.(\d+)\.", r"layers.\1.backward_message."),
    (r"\.message_fn\.", ".net."),
    (r"\.w_v\.", ".node_linear."),
    (r"\.w_e\.", ".edge_linear."),
    (r"(net|update)\.eq_layers\.0\.W\.", r"\1.linear."),
    (r"(net|update)\.eq_layers\.0\.g\.g1\.rho\.", r"\1.factor.hidden.invariant.rho."),
    (r"(net|update)\.eq_layers\.0\.g\.g1\.phi\.", r"\1.factor.hidden.phi."),
    (r"(net|update)\.eq_layers\.0\.g\.phi_in\.", r"\1.factor.input."),
    (r"(net|update)\.eq_layers\.0\.g\.phi_last\.", r"\1.factor.output."),
    (r"(\.net|(?<=\.update))\.rho\.", ".mlp."),
    (r"edge_update\.W\.", "edge_update.linear."),
    (r"edge_update\.g1\.rho\.", "edge_update.invariant.rho."),
    (r"^gnn\.project_last\.", "readout.output_linear."),
    (r"^gnn\.project_first\.", "readout.input_linear."),
    (r"^gnn\.readout\.rho\.", "readout.mlp."),
    (r"^gnn\.readout\.g1\.rho\.", "readout.invariant_layer.invariant.rho."),
    (r"^gnn\.readout\.g1\.phi\.", "readout.invariant_layer.phi."),
    (r"^gnn\.readout\.(local|global)_mlp\.", r"readout.\1_mlp."),
    (r"\.fc\.(\d+)\.", r".linears.\1."),
    (r"\.ln\.(\d+)\.", r".norms.\1."),
]
"""Published parameter name -> ours, applied in turn; branches of a factor by role until `_branch` numbers them."""


def _names(name: str, config: ScaleGMNConfig, model: ScaleGMN) -> Iterator[str]:
    """Our names of a published parameter; none for a module that no output depends on."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    if config.readout == "full_graph" and config.symmetry != "permutation":
        name = name.replace("readout.global_mlp.", "readout.mlp.")
    match = re.fullmatch(r"(.*\.factor)\.(input|hidden|output)\.(.*)", name)
    if match is None:
        yield name
        return
    factor, role, rest = match.groups()
    try:
        index = model.get_submodule(factor).index
    except AttributeError:  # the layer has no such module
        return
    shared = config.message.io_branches == 1 if ".net." in name else config.update.io_branches == 1
    roles = ["input", "output"] if role == "input" and shared else [role]
    for branch in {index[role] for role in roles if role in index}:
        yield f"{factor}.branches.{branch}.{rest}"


def load_official(scalegmn_args: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> ScaleGMN:
    """Our model with the parameters of a published checkpoint, in evaluation mode and the checkpoint's dtype.

    Args:
        scalegmn_args: the `scalegmn_args` section of the published configuration, with its `layer_layout`.
        state_dict: the published model's state dict. Parameters that no output depends on are ignored.

    Raises:
        ValueError: an option is not supported, or a parameter is missing.
    """
    config = translate_config(scalegmn_args)
    spec = NetSpec.mlp(scalegmn_args["layer_layout"], {"sign": "sine", "permutation": "sine"}[config.symmetry])
    model = config.build(spec).to(next(iter(state_dict.values())).dtype)
    expected = model.state_dict()
    loaded = {ours: tensor for name, tensor in state_dict.items() for ours in _names(name, config, model)}
    missing = sorted(set(expected) - set(loaded))
    if missing:
        raise ValueError(f"the checkpoint lacks {len(missing)} parameters of the model, first {missing[0]}")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(loaded[name])
    return model.eval()
