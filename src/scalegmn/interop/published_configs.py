"""Configuration files of the published ScaleGMN code, translated into this package's settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from scalegmn.configuration.files import leaves
from scalegmn.configuration.names import nearest
from scalegmn.models.scalegmn import EquivariantNetConfig, ScaleGMNConfig

_READ = {
    "": """d_hid num_layers direction equivariant symmetry gnn_skip_connections concat_mlp_directions reciprocal
        node_pos_embed edge_pos_embed""",
    "positional_encodings.": """final_linear_pos_embed sum_pos_enc po_as_different_linear equiv_net sum_on_io
        equiv_on_hidden layer_equiv_on_hidden num_mlps""",
    "gnn_args.": """message_fn_layers message_fn_skip_connections msg_equiv_on_hidden layer_msg_equiv_on_hidden
        msg_num_mlps pos_embed_msg update_node_feats_fn_layers update_node_feats_fn_skip_connections upd_equiv_on_hidden
        layer_upd_equiv_on_hidden upd_num_mlps pos_embed_upd mlp_on_io update_as_act update_as_act_arg update_edge_attr
        dropout dropout_all aggregator sign_symmetrization""",
    "mlp_args.": "d_k activation dropout layer_norm",
}
"""Section -> the published keys that are read, all of which a configuration needs."""

_OPTIONAL = {"readout_range", "out_scale", "readout_args.d_out", "readout_args.d_rho"}
_OPTIONAL |= {"layer_layout", "_max_kernel_height", "_max_kernel_width"}
"""Published keys that are read where they are given; `load_published_checkpoint` reads the layout and the kernel."""

_FIXED = {
    "mlp_args.final_activation": "identity",
    "mlp_args.batch_norm": False,
    "mlp_args.skip": False,
    "mlp_args.bias": True,
    "mlp_args.weight_init": None,
    "mlp_args.weight_init_args": None,
    "mlp_args.w0": 30.0,
    "graph_init.project_node_feats": True,
    "graph_init.project_edge_feats": True,
}
"""Published key -> the one value that our models cover."""

_NEVER_READ = {"d_in_v", "d_in_e", "jit", "compile", "gnn_args.layer_norm"}
"""Keys that the published code never reads."""

_IMPLIED = {"gnn_args.d_hid", *(f"graph_init.{name}" for name in ("d_in_v", "d_in_e", "d_node", "d_edge"))}
"""Published keys with one value that runs: `d_hid`, or the width of the input networks' features."""

_RUN = """batch_size debug wandb wandb_args.project wandb_args.entity wandb_args.group wandb_args.name wandb_args.tags
    data.dataset data.dataset_path data.split_path data.split_points data.data_path data.metrics_path data.layout_path
    data.idcs_file data.activation_function data.extra_aug data.switch_to_canon data.style_function
    train_args.num_epochs train_args.seed train_args.patience
    optimization.optimizer_args.lr optimization.optimizer_args.weight_decay"""
"""Keys outside `scalegmn_args` that mean the same here, under the same name."""

_RUN_TRANSLATED = """optimization.clip_grad optimization.clip_grad_max_norm optimization.optimizer_name
    optimization.scheduler_args.scheduler optimization.scheduler_args.warmup_steps train_args.loss"""
"""Keys outside `scalegmn_args` that are read and have other names here."""

_RUN_NOT_USED = """data.image_size data.layer_layout data.img_ds
    train_args.max_steps train_args.eval_every log_n_imgs inr_model.in_features
    inr_model.out_features inr_model.n_layers inr_model.hidden_features inr_model.img_shape
    optimization.scheduler_args.scheduler_mode optimization.scheduler_args.decay_rate
    optimization.scheduler_args.decay_steps optimization.scheduler_args.patience"""
"""Keys outside `scalegmn_args` that the published code reads and we do not."""

_RUN_NEVER_READ = """data.node_pos_embed data.edge_pos_embed train_args.val_acc_threshold
    optimization.scheduler_args.min_lr num_workers num_threads validate gpu_ids"""
"""Keys outside `scalegmn_args` that the published code never reads from a file, or overwrites before it does."""


def translate_config(scalegmn_args: Mapping[str, Any], exact: bool = True) -> ScaleGMNConfig:
    """Our configuration for a published `scalegmn_args` section.

    Args:
        scalegmn_args: the section.
        exact: false: what the published code computes even where that is not quite symmetric, for its checkpoints: no
            inverse edge features, an epsilon beside norms.

    Raises:
        ValueError: it uses an option that is not supported, lacks a key or has an unknown one; names all of them.
    """
    _check_keys(scalegmn_args)
    gnn, mlp, encodings = (scalegmn_args[key] for key in ("gnn_args", "mlp_args", "positional_encodings"))
    symmetry, direction, d = (scalegmn_args[key] for key in ("symmetry", "direction", "d_hid"))
    readout = scalegmn_args.get("readout_args", {})

    def net(options: Mapping[str, Any], name: str, layers: str, skips: bool, positions: bool) -> EquivariantNetConfig:
        """The net whose keys contain `name`."""
        branches = options[f"{name}num_mlps"]
        io: Literal["same", "factor", "mlp", "layer"] = "same"
        if branches > 1 and gnn["mlp_on_io"]:
            io = "mlp"
        elif branches > 1 and options[f"layer_{name}equiv_on_hidden"]:
            io = "layer"
        elif branches > 1 and options[f"{name}equiv_on_hidden"]:
            io = "factor"
        return EquivariantNetConfig(io, 1 if io == "same" else branches - 1, gnn[f"{layers}_layers"], skips, positions)

    chosen: dict[str, Any] = {"node_positions": "none"}
    equiv_net = encodings["equiv_net"] and symmetry != "permutation"
    if scalegmn_args["node_pos_embed"]:
        chosen["node_positions"] = ("net" if equiv_net else "product") + ("_sum" if encodings["sum_on_io"] else "")
    if equiv_net:
        chosen["position_net"] = net(encodings, "", "message_fn", False, True)
    if symmetry != "permutation" and (scalegmn_args["node_pos_embed"] or scalegmn_args["edge_pos_embed"]):
        if encodings["final_linear_pos_embed"] and not equiv_net:
            chosen["position_map"] = "shared"
        if encodings["po_as_different_linear"]:  # after the shared one, which it includes
            chosen["position_map"] = "per_type"
    if gnn["update_as_act"] and direction == "forward" and symmetry != "permutation":
        chosen["update_rule"] = f"sine_{gnn['update_as_act_arg']}"
    return ScaleGMNConfig(
        symmetry=symmetry,
        direction=direction,
        output="parameters" if scalegmn_args["equivariant"] else "vector",
        readout="full_graph" if scalegmn_args.get("readout_range") == "full_graph" else None,
        readout_projection="mlp" if scalegmn_args["concat_mlp_directions"] else "linear",
        num_layers=scalegmn_args["num_layers"],
        hidden_dim=d,
        mlp_dims=None if mlp["d_k"] == [d] else tuple(mlp["d_k"]),
        mlp_activation=mlp["activation"],
        mlp_layer_norm=mlp["layer_norm"],
        mlp_dropout=gnn["dropout"] if gnn["dropout_all"] else mlp["dropout"],
        readout_dim=None if readout.get("d_rho") == d else readout.get("d_rho"),
        out_dim=readout.get("d_out", 10),
        out_scale=scalegmn_args.get("out_scale", 0.01),
        normalize=None if exact else False,
        edge_positions=scalegmn_args["edge_pos_embed"],
        **chosen,
        skip_connections=scalegmn_args["gnn_skip_connections"],
        dropout=gnn["dropout"],
        sign_map="symmetrized" if gnn["sign_symmetrization"] else "absolute",
        aggregator=gnn["aggregator"],
        update_edges=gnn["update_edge_attr"],
        norm_epsilon=0.0 if exact else 1e-10,
        reciprocal=exact and scalegmn_args["reciprocal"],
        message=net(gnn, "msg_", "message_fn", gnn["message_fn_skip_connections"], gnn["pos_embed_msg"]),
        update=net(
            gnn, "upd_", "update_node_feats_fn", gnn["update_node_feats_fn_skip_connections"], gnn["pos_embed_upd"]
        ),
    )


def translate_file(content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The content of a published configuration file as settings of this package; any other content as it is.

    A published file is one with `scalegmn_args.gnn_args`.

    Args:
        content: what a YAML file holds.

    Returns:
        Settings as in our own files, and remarks on keys that have no effect.

    Raises:
        ValueError: keys are unknown or missing, or ask for what is not supported; names all of them.
    """
    model = content.get("scalegmn_args")
    if not isinstance(model, dict) or "gnn_args" not in model:
        return content, []
    content = _with_nulls(content)
    if isinstance(content.get("wandb"), dict):  # so in the published files of cifar_inr_cls
        content["wandb_args"] = content.pop("wandb")
    model, given = content.pop("scalegmn_args"), dict(leaves(content))
    same, translated, not_used, never_read = (
        set(keys.split()) for keys in (_RUN, _RUN_TRANSLATED, _RUN_NOT_USED, _RUN_NEVER_READ)
    )
    known = same | translated | not_used | never_read
    problems = [f"{key}: no published key{nearest(key, known)}" for key in given if key not in known]
    problems += _unsupported(given)
    try:
        config = asdict(translate_config(_as_run(model)))
    except ValueError as error:
        problems.append(str(error))
    except TypeError as error:
        problems.append(f"scalegmn_args: a value has the wrong type ({error})")
    if problems:
        raise ValueError("; ".join(problems))
    settings = {key: value for key, value in given.items() if key in same and value is not None}
    clip, steps = given.get("optimization.clip_grad"), given.get("optimization.scheduler_args.warmup_steps", 0)
    scheduler = given.get("optimization.scheduler_args.scheduler")
    settings["optimization.clip_grad_max_norm"] = given.get("optimization.clip_grad_max_norm") if clip else None
    settings["optimization.scheduler_args.warmup_steps"] = steps if scheduler else 0
    if given.get("train_args.loss") in ("MSE", "BCE"):  # classification always has CrossEntropyLoss
        settings["train_args.loss"] = given["train_args.loss"]
    settings |= {f"scalegmn_args.{key}": list(v) if isinstance(v, tuple) else v for key, v in leaves(config)}
    given |= {f"scalegmn_args.{key}": value for key, value in leaves(model)}
    never_read |= {f"scalegmn_args.{key}" for key in _NEVER_READ}
    remarks = {"not used": not_used, "not used, nor ever read by the published code": never_read}
    ignored = {remark: [key for key in given if key in keys] for remark, keys in remarks.items()}
    return _nested(settings), [f"{remark}: {', '.join(keys)}" for remark, keys in ignored.items() if keys]


_SUPPORTED = {
    "optimization.optimizer_name": ("AdamW",),
    "optimization.scheduler_args.scheduler": ("WarmupLRScheduler", None),
    "train_args.loss": ("CrossEntropyLoss", "MSE", "BCE", None),
}
"""Key outside `scalegmn_args` -> the values that are supported."""


def _unsupported(given: Mapping[str, Any]) -> list[str]:
    """Problems with values outside `scalegmn_args`."""
    problems = []
    for key, supported in _SUPPORTED.items():
        if given.get(key, supported[0]) not in supported:
            *others, last = ("null" if value is None else repr(value) for value in supported)
            names = f"{', '.join(others)} and {last}" if others else last
            problems.append(f"{key}: {given[key]!r} is not supported, only {names}")
    return problems


def _with_nulls(value: Any) -> Any:
    """A copy with null for the published files' `None`, which YAML reads as a word."""
    if isinstance(value, dict):
        return {key: _with_nulls(item) for key, item in value.items()}
    return None if value == "None" else value


def _as_run(scalegmn_args: Mapping[str, Any]) -> dict[str, Any]:
    """The section as the published scripts run it: every width in an MLP is `d_hid`, whatever the file says."""
    changed = dict(scalegmn_args)
    for section, key in (("mlp_args", "d_k"), ("readout_args", "d_rho")):
        if key in scalegmn_args.get(section, ()):
            value, d = scalegmn_args[section][key], scalegmn_args.get("d_hid")
            changed[section] = {**scalegmn_args[section], key: [d] * len(value) if key == "d_k" else d}
    return changed


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `leaves`."""
    content: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, name = key.split(".")
        section = content
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return content


def _check_keys(scalegmn_args: Mapping[str, Any]) -> None:
    """Raises ValueError for missing and unknown keys and for values that are not supported."""
    given = dict(leaves(scalegmn_args))
    needed = [section + name for section, names in _READ.items() for name in names.split()]
    known = {*needed, *_OPTIONAL, *_FIXED, *_NEVER_READ, *_IMPLIED}
    problems = [f"{key}: is missing" for key in needed if key not in given]
    for key, value in given.items():
        if key not in known:
            problems.append(f"{key}: no published key{nearest(key, known)}")
        elif value != _FIXED.get(key, value):
            problems.append(f"{key}: {value!r} is not supported, only {_FIXED[key]!r}")
    encodings = "positional_encodings"
    if given.get("symmetry") != "permutation":
        if given.get(f"{encodings}.sum_pos_enc"):
            problems.append(f"{encodings}.sum_pos_enc: breaks every symmetry but permutation; use sum_on_io")
        if given.get(f"{encodings}.equiv_net") and given.get("edge_pos_embed") and not given.get("node_pos_embed"):
            problems.append(f"{encodings}.equiv_net: for edges, needs node_pos_embed as well")
    if problems:
        raise ValueError("; ".join(f"scalegmn_args.{problem}" for problem in problems))
