"""Outputs of the published models, float64 (tests/fixtures)."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from scalegmn.interop.published_checkpoints import load_published_checkpoint
from scalegmn.interop.published_configs import translate_config
from scalegmn.networks import NetParams, NetSpec
from scalegmn.symmetry.measure import assert_invariant, invariance_error, spread

CASES = sorted(Path(__file__).parents[1].glob("fixtures/*.safetensors"))


def read(path):
    """scalegmn_args, published state dict, input networks, published output (of editing models: [B, parameters])."""
    with safe_open(path, "pt") as file:
        case = json.loads(file.metadata()["case"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    state = {name.removeprefix("state."): t for name, t in tensors.items() if name.startswith("state.")}
    weights, biases = (
        [tensors[f"input.{kind}.{layer}"] for layer in range(len(case["layer_layout"]) - 1)]
        for kind in ("weight", "bias")
    )
    params = NetParams.from_tensors(weights, biases, case["activations"])
    if case["scalegmn_args"]["equivariant"]:
        layers = range(params.spec.num_layers)
        output = [tensors[f"output.{kind}.{layer}"] for kind in ("weight", "bias") for layer in layers]
        return case["scalegmn_args"], state, params, flat(output)
    return case["scalegmn_args"], state, params, tensors["output"]


def flat(changes):
    """[B, parameters] of a list of [B, ...]."""
    return torch.cat([change.flatten(1) for change in changes], 1)


def test_all_cases_are_there():
    assert len(CASES) == 24


@pytest.mark.parametrize("engine", ["fast", "plain"])
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_published_outputs(path, engine, generator):
    scalegmn_args, state, params, output = read(path)
    model = load_published_checkpoint(scalegmn_args, dict(reversed(state.items())))  # in any order
    model.engine = engine
    editing = scalegmn_args["equivariant"]

    def apply(params):
        found = model(params)
        return flat([*found.weights, *found.biases]) if editing else found

    tolerance = 1e-10 * spread(output)
    assert (apply(params) - output).abs().max() < tolerance
    alone = torch.cat([apply(params[index : index + 1]) for index in range(len(params))])
    assert (alone - output).abs().max() < tolerance
    symmetry, direction = scalegmn_args["symmetry"], scalegmn_args["direction"]
    if editing:
        return
    error = invariance_error(model, params, generator, scale=symmetry != "permutation")
    if symmetry in ("sign", "permutation"):
        assert error < 1e-9
    else:  # the epsilon beside norms; and, against the edges, no inverse of the weight
        assert error > (1e-2 if direction == "bidirectional" else 0)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_published_configs_train_our_exact_models(path, generator):
    """The same configuration without the checkpoint is exactly invariant."""
    scalegmn_args, _, params, _ = read(path)
    config = translate_config(scalegmn_args)
    if config.output == "vector":
        model = config.build(params.spec).double().eval()
        assert_invariant(model, params, generator, scale=config.symmetry != "permutation", tolerance=1e-8)


@pytest.mark.slow
def test_every_published_parameter_matters_where_it_is_loaded():
    """Changing any loaded parameter changes the output: nothing is matched to the wrong place and then ignored."""
    (path,) = (path for path in CASES if path.stem == "mnist_cls-bidirectional")
    scalegmn_args, state, params, output = read(path)
    model = load_published_checkpoint(scalegmn_args, state)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            kept = parameter.clone()
            parameter += 0.1 * torch.randn_like(parameter)
            assert (model(params) - output).abs().max() > 0, name
            parameter.copy_(kept)
    assert (model(params) - output).abs().max() < 1e-10 * spread(output)


def test_problems_are_named():
    (path,) = (path for path in CASES if path.stem == "mnist_cls-forward")
    scalegmn_args, state, _, _ = read(path)
    with pytest.raises(ValueError, match=r"lacks 1 parameters.*readout.mlp.linears.1.bias"):
        load_published_checkpoint(scalegmn_args, {k: v for k, v in state.items() if k != "gnn.readout.rho.fc.1.bias"})
    with pytest.raises(ValueError, match=r"has a parameter extra.weight"):
        load_published_checkpoint(scalegmn_args, state | {"extra.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"node_linear.weight: shape \(1,\), expected"):
        load_published_checkpoint(scalegmn_args, state | {"construct_graph.proj_bias.weight": torch.zeros(1).double()})
    changed = copy.deepcopy(scalegmn_args)
    changed["mlp_args"] |= {"skip": True, "batch_norm": True, "final_activation": "tanh"}
    with pytest.raises(
        ValueError, match=r"final_activation: 'tanh' is not supp.*batch_norm: True.*mlp_args.skip: True"
    ):
        load_published_checkpoint(changed, state)
    changed = copy.deepcopy(scalegmn_args)
    changed["gnn_args"]["agregator"] = changed["gnn_args"].pop("aggregator")
    with pytest.raises(
        ValueError, match=r"aggregator: is missing; .*agregator: no published key, did you mean gnn_args.agg"
    ):
        load_published_checkpoint(changed, state)


D, LAYOUT = 4, [2, 3, 3, 1]
POSITIONS = {
    "per-type": {"po_as_different_linear": True},
    "shared": {"final_linear_pos_embed": True, "sum_on_io": False},
    "shared-per-type": {"final_linear_pos_embed": True, "po_as_different_linear": True},
    "net-sum": {"equiv_net": True},
    "net-mlp": {"equiv_net": True, "sum_on_io": False, "equiv_on_hidden": False},
    "net-layer-per-type": {
        **{"equiv_net": True, "sum_on_io": False, "layer_equiv_on_hidden": True},
        **{"final_linear_pos_embed": True, "po_as_different_linear": True},
    },
}
UPDATES = {"sum": {"update_as_act": True}, "cat": {"update_as_act": True, "update_as_act_arg": "cat"}}


def published(name):
    """A published configuration of a tiny model with one of the options that no published file uses, and parameters."""
    (path,) = (path for path in CASES if path.stem == "mnist_cls-forward")
    args, *_ = read(path)
    encodings, gnn = {"equiv_on_hidden": False, "num_mlps": 2, **POSITIONS.get(name, {})}, UPDATES.get(name, {})
    flags = dict.fromkeys(("msg_equiv_on_hidden", "upd_equiv_on_hidden"), False)
    args["gnn_args"] |= {**flags, "mlp_on_io": name == "net-mlp", "msg_num_mlps": 2, "upd_num_mlps": 2, **gnn}
    args["positional_encodings"] |= encodings
    args |= {
        "gnn_skip_connections": False,
        "d_hid": D,
        "num_layers": 2,
        "layer_layout": LAYOUT,
        "edge_pos_embed": name != "net-mlp",
    }
    args["mlp_args"] |= {"layer_norm": False, "d_k": [D]}
    state, generator = {}, torch.Generator().manual_seed(0)

    def add(name, *shape):
        state[name] = torch.randn(*shape, generator=generator, dtype=torch.float64) / 2

    def add_mlp(name, in_dim, out_dim=D):
        for k, (i, o) in enumerate(((in_dim, D), (D, out_dim))):
            add(f"{name}.fc.{k}.weight", o, i)
            add(f"{name}.fc.{k}.bias", o)

    def add_net(name, in_dim, extra_dim=0, io="same"):
        for layers in ("eq_layers", "eq_layers_in") if io != "same" else ("eq_layers",):
            if layers == "eq_layers_in" and io == "mlp":
                add_mlp(f"{name}.eq_layers_in.0.rho", in_dim + extra_dim)
                continue
            add(f"{name}.{layers}.0.W.weight", D, in_dim)
            add_mlp(f"{name}.{layers}.0.g.g1.rho", in_dim, in_dim)
            add_mlp(f"{name}.{layers}.0.g.g1.phi", in_dim + extra_dim)

    io = "mlp" if args["gnn_args"]["mlp_on_io"] else "same"
    add("construct_graph.proj_bias.weight", D, 1)
    add("construct_graph.proj_weight.weight", D, 1)
    for suffix, types in (("", 5), *([("_edge", 4)] if args["edge_pos_embed"] else [])):
        add(f"positional_embeddings{suffix}.pos_embed", types, D)
        if encodings.get("equiv_net"):
            add_net(f"positional_embeddings{suffix}.init_fn", D, D, "layer" if "layer" in name else io)
        if encodings.get("po_as_different_linear"):
            add(f"positional_embeddings{suffix}.linears", types, D, D)
        if encodings.get("final_linear_pos_embed"):
            add(f"positional_embeddings{suffix}.final_linear.weight", D, D)
    for layer in ("gnn.fw_layers.0", "gnn.fw_layers.1"):
        add(f"{layer}.w_v.weight", D, D)
        add(f"{layer}.w_e.weight", D, D)
        add_net(f"{layer}.message_fn", D, io=io)
        if not gnn:
            add_net(f"{layer}.update_node_feats_fn", 2 * D, io=io)
        else:
            add(f"{layer}.update_node_feats_fn.W.weight", D, 2 * D if name == "cat" else D)
            state[f"{layer}.update_node_feats_fn.W.weight"] /= 30  # sin(30 x) of large x amplifies rounding errors
        if name == "sum":
            add(f"{layer}.w_h.weight", D, D)
            add(f"{layer}.w_msg.weight", D, D)
    add("gnn.fw_layers.0.update_edge_attr_fn.W.weight", D, D)
    add_mlp("gnn.fw_layers.0.update_edge_attr_fn.g1.rho", D)
    add_mlp("gnn.fw_layers.0.update_edge_attr_fn.phi", 2 * D)
    add_mlp("gnn.readout.rho", D, 10)
    return args, state


def twin(args, state, params):
    """The published forward model on one network, node by node and edge by edge."""
    encodings, gnn = args["positional_encodings"], args["gnn_args"]

    def mlp(name, *parts):
        hidden = state[f"{name}.fc.0.weight"] @ torch.cat(parts) + state[f"{name}.fc.0.bias"]
        return state[f"{name}.fc.1.weight"] @ torch.nn.functional.silu(hidden) + state[f"{name}.fc.1.bias"]

    def invariant(name, x):
        return mlp(name, x) + mlp(name, -x)

    def net(name, x, io, *extras):
        if io and f"{name}.eq_layers_in.0.rho.fc.0.weight" in state:
            return mlp(f"{name}.eq_layers_in.0.rho", x, *extras)
        layer = f"{name}.eq_layers_in.0" if io and f"{name}.eq_layers_in.0.W.weight" in state else f"{name}.eq_layers.0"
        return state[f"{layer}.W.weight"] @ x * mlp(f"{layer}.g.g1.phi", invariant(f"{layer}.g.g1.rho", x), *extras)

    def embed(x, kind, name, io, summed):
        p = state[f"{name}.pos_embed"][kind]
        if encodings["equiv_net"]:
            x = x + p if summed else net(f"{name}.init_fn", x, io, p)
        else:
            x = x + p if summed else x * p
            if encodings["final_linear_pos_embed"]:
                x = state[f"{name}.final_linear.weight"] @ x
        return state[f"{name}.linears"][kind] @ x if encodings["po_as_different_linear"] else x

    node_types, layer_of = [0, 1, 2, 2, 2, 3, 3, 3, 4], [0, 0, 1, 1, 1, 2, 2, 2, 3]
    first = [0, 2, 5, 8]
    io = [layer in (0, 3) for layer in layer_of]
    raw = torch.cat([torch.ones(2, dtype=torch.float64), *(bias[0] for bias in params.biases)])
    x = [state["construct_graph.proj_bias.weight"] @ raw[i][None] for i in range(9)]
    x = [embed(x[i], node_types[i], "positional_embeddings", io[i], io[i] and encodings["sum_on_io"]) for i in range(9)]
    e = {}
    for j, i in ((j, i) for j in range(9) for i in range(9) if layer_of[i] == layer_of[j] + 1):
        weight = params.weights[layer_of[j]][0, i - first[layer_of[i]], j - first[layer_of[j]]]
        e[j, i] = state["construct_graph.proj_weight.weight"] @ weight[None]
        if args["edge_pos_embed"]:
            e[j, i] = embed(
                e[j, i], (j, j, 2, 3)[min(j, 2) if j < 5 else 3], "positional_embeddings_edge", io[i], False
            )
    for t in range(2):
        layer = f"gnn.fw_layers.{t}"
        m = [torch.zeros(D, dtype=torch.float64) for _ in range(9)]
        for j, i in e:
            product = state[f"{layer}.w_v.weight"] @ x[j] * (state[f"{layer}.w_e.weight"] @ e[j, i])
            m[i] = m[i] + net(f"{layer}.message_fn", product, io[i])
        if t == 0:
            update = f"{layer}.update_edge_attr_fn"
            canonical = [invariant(f"{update}.g1.rho", x[i]) for i in range(9)]
            e = {
                (j, i): state[f"{update}.W.weight"] @ e[j, i] * mlp(f"{update}.phi", canonical[j], canonical[i])
                for j, i in e
            }
        update = f"{layer}.update_node_feats_fn"
        if not gnn["update_as_act"]:
            x = [net(update, torch.cat([x[i], m[i]]), io[i]) for i in range(9)]
        elif gnn["update_as_act_arg"] == "cat":
            x = [torch.sin(30 * (state[f"{update}.W.weight"] @ torch.cat([x[i], m[i]]))) for i in range(9)]
        else:
            joined = [state[f"{layer}.w_h.weight"] @ x[i] + state[f"{layer}.w_msg.weight"] @ m[i] for i in range(9)]
            x = [torch.sin(30 * (state[f"{update}.W.weight"] @ joined[i])) for i in range(9)]
    return mlp("gnn.readout.rho", x[8])


@pytest.mark.parametrize("name", [*POSITIONS, *UPDATES])
def test_options_that_no_published_file_uses(name, random_params):
    args, state = published(name)
    model = load_published_checkpoint(args, state)
    params = random_params(NetSpec.mlp(LAYOUT, "sine"), 3)
    expected = torch.stack([twin(args, state, params[index : index + 1]) for index in range(3)])
    assert (model(params) - expected).abs().max() < 1e-9 * spread(expected)


def test_published_options_that_break_a_symmetry_or_do_nothing():
    args, _ = published("net-sum")
    args["positional_encodings"]["equiv_on_hidden"] = True
    with pytest.raises(ValueError, match=r"position_net.io: factor is not equivariant on edges"):
        translate_config(args)
    args["positional_encodings"] |= {"equiv_net": False, "sum_pos_enc": True}
    with pytest.raises(ValueError, match="sum_pos_enc: breaks every symmetry but permutation; use sum_on_io"):
        translate_config(args)
    args["symmetry"] = "permutation"  # which sums, whatever the options say
    args["positional_encodings"] |= {"equiv_net": True, "final_linear_pos_embed": True}
    config = translate_config(args)
    assert (config.node_positions, config.position_map) == ("product_sum", "none")
    args, _ = published("cat")
    args["direction"] = "bidirectional"  # whose updates are nets, whatever update_as_act says
    assert translate_config(args).update_rule == "net"
    args |= {"direction": "forward", "symmetry": "scale"}
    with pytest.raises(ValueError, match=r"update_rule: sine_cat is only .* for sign; use net"):
        translate_config(args)
