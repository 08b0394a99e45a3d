"""Published Neural Graphs in our words: options, parameter names, statistics of the inputs."""

import re

import torch

from scalegmn.networks import LayerSpec, NetSpec

DEEP = NetSpec((*(LayerSpec(i, o, (k, k), "relu") for i, o, k in ((1, 4, 5), (4, 2, 3), (2, 5, 1))), LayerSpec(5, 2)))
WIDE = NetSpec((LayerSpec(1, 6, (3, 3), "relu"), LayerSpec(6, 2)))

GRAPH = [
    (r"^construct_graph\.pos_embed$", "graph.node_positions"),
    (r"^construct_graph\.act_emb\.embedding\.weight$", "graph.activations"),
    (r"^construct_graph\.proj_edge_in\.", "graph.edge_linear."),
    (r"^construct_graph\.proj_node_in\.", "graph.node_linear."),
    (r"^construct_graph\.gpf\.inputs$", "graph.points"),
    (r"^construct_graph\.gpf\.proj\.(\d+)\.0\.", r"graph.probe_linears.\1."),
    (r"^construct_graph\.gpf\.proj\.(\d+)\.1\.", r"graph.probe_norms.\1."),
]
ENCODERS = {"proj_bias": "bias_encoder", "proj_weight": "weight_encoder", "proj_mlp_weight": "linear_encoder"}
HEADS = {"proj_out": "readout", "proj_edge": "edge_readout", "proj_node": "node_readout"}


def options(case):
    """Of the graph and of what is read from it."""
    published = case["hyper_parameters"]
    graph = published["graph_constructor"]
    found = {
        "reverse_edges": published["rev_edge_features"],
        "num_frequencies": graph["sin_emb_dim"] if graph["sin_emb"] else 0,
        "frequency_scale": graph["inp_factor"],
        "encoder_layers": graph["input_layers"],
        "num_probes": graph["num_probe_features"],
        "linear_encoder": not graph.get("linear_as_conv", True),
        "normalize": (case.get("stats") or {"weights_mean": None})["weights_mean"] is not None,
        "dropout": 0.0,
    }
    if case["task"] == "editing":
        return found | {"output": "parameters", "denormalize": published["normalize"]}
    pooling = {("cat", "last"): "outputs", ("mean", "all"): "mean", ("cls_token", "last"): "token"}
    chosen = pooling[published["pooling_method"], published["pooling_layer_idx"]]
    return found | {"out_dim": published["d_out"], "pooling": chosen}


def ours(case, state, renames, unused):
    """Published parameters, and the statistics of the inputs, by our names."""
    found, indices = {}, {}
    for name in sorted(state):
        tensor, new = state[name], name
        for pattern, replacement in (*GRAPH, *renames):
            new = re.sub(pattern, replacement, new)
        head, _, rest = new.partition(".")
        if (linear := re.match(r"^construct_graph\.(proj_\w+)\.(\d+)\.(\w+)$", new)) and linear[1] in ENCODERS:
            if linear[3] == "b":
                new = f"graph.{ENCODERS[linear[1]]}.fourier.frequencies"
            else:  # Linears in order of index
                places = indices.setdefault(linear[1], [])
                places += [linear[2]] if linear[2] not in places else []
                new = f"graph.{ENCODERS[linear[1]]}.linears.{places.index(linear[2])}.{linear[3]}"
        elif head in HEADS:
            index, kind = rest.split(".")
            new = f"{HEADS[head]}.linears.{int(index) // 2}.{kind}"
        if new == "graph.points":
            tensor = tensor[0]
        if not re.search(r"(weight|bias)_scale\.", new) and not any(re.search(pattern, name) for pattern in unused):
            found[new] = tensor
    for kind in ("weight", "bias"):
        scales = [state[name] for name in sorted(state) if name.startswith(f"{kind}_scale.")]
        if scales:
            found[f"{kind}_scales"] = torch.stack(scales)
    if options(case)["normalize"]:
        for kind, plural in (("weight", "weights"), ("bias", "biases")):
            for ours, theirs in (("means", "mean"), ("scales", "std")):
                values = torch.tensor(case["stats"][f"{plural}_{theirs}"], dtype=torch.float64)
                found[f"normalization.{kind}_{ours}"] = values
    return found


INR = NetSpec.mlp([2, 32, 32, 1], "sine")


def count(config, spec=INR):
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in config.build(spec).parameters())
