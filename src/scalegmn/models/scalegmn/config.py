"""The options of ScaleGMN."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from scalegmn.engine import native
from scalegmn.models.base import ModelConfig
from scalegmn.models.registry import METANETWORKS
from scalegmn.models.scalegmn.model import ScaleGMN
from scalegmn.networks import HETERO, NetSpec
from scalegmn.nn.initialization import Init, initialized
from scalegmn.nn.messages import MESSAGES
from scalegmn.nn.probes import ProbeImages


@dataclass(frozen=True)
class EquivariantNetConfig:
    """One equivariant net, x -> (W x) * g(x, p), g invariant, and what replaces it at input and output nodes.

    `permutation` models replace it by one MLP for all nodes and read none of these fields.
    """

    io: Literal["same", "factor", "mlp", "layer"] = "factor"
    """Input and output nodes have no symmetry. `same`: they share the layer of hidden nodes; `factor`: they share W,
    but their g is an MLP of [x, p]; `mlp`: an MLP of [x, p] replaces the layer; `layer`: they have another equivariant
    layer."""

    io_branches: Literal[1, 2] = 1
    """What `io` names is 1: shared by input and output nodes; 2: one for input nodes, one for output nodes."""

    num_layers: int = 1
    """Equivariant layers in a row."""

    skip_connections: bool = False
    """Add the residual W_s x to each equivariant layer."""

    positions: bool = False
    """Pass the positional embedding p to g."""


@dataclass(frozen=True)
class BranchConfig:
    """An MLP of what is the same for all networks of one function; its result is added to that of the graph."""

    statistics: bool = False
    """Read exactly invariant statistics (`scalegmn.symmetry.statistics`), standardised over the training split."""

    answers: bool = False
    """Read what the networks, classifiers, answer to the `num_probes` learned inputs: the softmax of their outputs, and
    log10 of the outputs' standard deviation."""

    hidden_dims: tuple[int, ...] = (256, 256)
    """Hidden widths."""

    dropout: float = 0.0
    """Dropout after every activation."""

    @property
    def reads(self) -> bool:
        """Whether there is a branch."""
        return self.statistics or self.answers


@dataclass(frozen=True)
class ScaleGMNConfig(ModelConfig):
    """ScaleGMN: message passing on the parameter graph that respects permutations and rescalings of neurons."""

    name = "scalegmn"
    supports_multiple_architectures = True

    init: Init = "published"
    """Initial parameters. balanced: features keep their size through all layers, and permutation starts odd, as if it
    knew signs (`scalegmn.nn.initialization`); INRs are learned several times as fast. published: as in the published
    code."""

    normalize: bool | None = None
    """Divide the weights of each layer, and its biases, by their root mean square over the training split; null: only
    in permutation models, which learn little without it."""

    symmetry: Literal["permutation", "sign", "scale", "hetero"] = "sign"
    """Symmetry beyond permutations: `sign` for sine and tanh networks, `scale` for relu, `hetero` for zoos or
    networks of both, `permutation` for none (GMN)."""

    direction: Literal["forward", "bidirectional"] = "forward"
    """Messages along the input network's edges, or along and against them."""

    readout: Literal["last_layer", "full_graph"] | None = None
    """For vectors: read the output nodes (and, bidirectional, the input nodes), or all nodes; null: last_layer for
    chains of layers, full_graph for other networks, of which num_layers would show a part only."""

    readout_projection: Literal["linear", "mlp"] = "linear"
    """How a bidirectional last_layer readout projects output and input nodes before it joins them."""

    equal_outputs: bool = False
    """For vectors: read output neurons as equals, so that their order does not matter: for tasks that do not name the
    networks' classes, such as the prediction of accuracies."""

    num_layers: int = 4
    """Message passing layers."""

    hidden_dim: int = 128
    """Width d of node and edge features."""

    mlp_dims: tuple[int, ...] | None = None
    """Hidden widths of every MLP; null: one hidden layer of width hidden_dim."""

    mlp_activation: Literal["silu", "relu", "gelu", "tanh"] = "silu"
    """Activation inside every MLP."""

    mlp_layer_norm: bool = True
    """LayerNorm before every activation inside an MLP."""

    mlp_dropout: float = 0.0
    """Dropout after every activation inside an MLP."""

    readout_dim: int | None = None
    """Width of the sum over nodes in a full_graph readout; null: hidden_dim."""

    node_positions: Literal["none", "product", "product_sum", "net", "net_sum"] = "product_sum"
    """How the positional embeddings P of node types (each input node, each hidden layer, each output node) enter.
    product: x * P; net: an equivariant net of (x, P), `position_net`; product_sum and net_sum: the same at hidden
    nodes, but x + P at input and output nodes. permutation models compute x + P at all nodes."""

    edge_positions: bool = True
    """Positional embeddings P of edge types: e * P, or an equivariant net of (e, P) if node_positions is net or
    net_sum."""

    max_hidden_layers: int | None = None
    """The largest number of hidden layers that the model reads: it has positional embeddings, and scalars of
    `normalize`, for each. null: exactly as many as the networks have. Only models of vectors read networks of different
    depths."""

    position_net: EquivariantNetConfig = field(default_factory=lambda: EquivariantNetConfig(io="same", positions=True))
    """The equivariant net of node_positions net and net_sum. That of edges has the same options; `io` is then about
    edges into output nodes."""

    position_map: Literal["none", "shared", "per_type"] = "none"
    """A linear map without bias after the positional embeddings of nodes, and one after those of edges: shared by all
    types, or one per type. permutation models have none."""

    skip_connections: bool = True
    """x' = S x + layer(x) around every message passing layer."""

    dropout: float = 0.0
    """Dropout on node features after every layer."""

    sign_map: Literal["symmetrized", "absolute"] = "symmetrized"
    """The sign-invariant map: rho(x) + rho(-x) with an MLP rho, or |x|."""

    norm_epsilon: float = 0.0
    """The scale-invariant map is x / (||x|| + norm_epsilon): exact at 0; 1e-10 in the published code."""

    sizes: bool = False
    """For vectors: the readout also reads log10 of the root mean square of each canonical weight and bias tensor,
    standardised over the training split; features of nodes hardly show how large a network's weights are."""

    branch: BranchConfig = field(default_factory=BranchConfig)
    """For vectors: what is read beside the graph."""

    aggregator: Literal["add", "mean"] = "add"
    """How a node aggregates its messages."""

    width_transfer: bool = False
    """Read networks of any width alike: edges are weights times the number of neurons that send along them. The result
    is then the same for the same function with every hidden neuron copied r times and outgoing weights divided by r,
    and a model trained on narrow networks reads wide ones. For chains; needs aggregator mean."""

    update_edges: bool = True
    """Update edge features in every layer; false: every layer reads the initial edge features."""

    reciprocal: bool = True
    """Bidirectional scale and hetero: messages against an edge read w / ||w||^2, which makes them exactly equivariant
    (w / floor^2 below a floor of 1e-3 of the norm of the neuron's [W, b]); false: they read w, as in the published
    code, whose output moves when neurons are rescaled."""

    message: EquivariantNetConfig = field(default_factory=EquivariantNetConfig)
    """The message function MSG. Its p: the receiving node's; in bidirectional models the sending node's, as in the
    published code."""

    message_function: str | None = None
    """The registered message function (`scalegmn.nn.messages.MESSAGES`); null: scale, MSG((A x_j) * (B e_ji)), or for
    permutation concat, MLP([e_ji, x_j]). product: (A x_j) * (B e_ji)."""

    update: EquivariantNetConfig = field(default_factory=EquivariantNetConfig)
    """The update function UPD. Its p: the updated node's."""

    update_rule: Literal["net", "sine_sum", "sine_cat"] = "net"
    """UPD. net: the equivariant net `update`; for sign also, with the same weights at all nodes, sine_cat:
    sin(30 W [x, m...]); sine_sum: sin(30 W (W_0 x + W_1 m + ...))."""

    num_probes: int = 0
    """Learned inputs of the networks, if these are chains: what a neuron computes for each of them, before its
    activation, becomes a feature beside its bias, exactly as symmetric; 0: none."""

    probe_losses: int = 0
    """H learned losses of what the networks answer to the probes. The gradients of each, by what a neuron computes for
    each probe and by the weights, are features of nodes and edges, exactly as symmetric; 0: none."""

    probe_images: ProbeImages = field(default_factory=ProbeImages)
    """Of CNNs, the learned inputs."""

    engine: Literal["fast", "plain"] = "fast"
    """plain: compute the equations as they are written; slower, for debugging."""

    def __post_init__(self) -> None:
        counts = ["num_layers", "hidden_dim", "out_dim", "readout_dim", "max_hidden_layers"]
        counts += [f"{net}.num_layers" for net in ("message", "update", "position_net")]
        counts += ["probe_images.image_size", "probe_images.stride"]
        problems = self.wrong_choices() + self.wrong_numbers(counts, ["dropout", "mlp_dropout", "branch.dropout"])
        if self.num_probes < 0:
            problems.append(f"num_probes: found {self.num_probes}, expected 0 or more")
        problems += self._gradient_problems() if self.probe_losses else []
        for name, widths in (("mlp_dims", self.mlp_dims), ("branch.hidden_dims", self.branch.hidden_dims)):
            if widths is not None and (not widths or min(widths) < 1):
                problems.append(f"{name}: found {list(widths)}, expected one or more positive widths")
        if not self.probe_images.rate > 0:
            problems.append(f"probe_images.rate: found {self.probe_images.rate}, expected above 0")
        if self.message_function is not None and self.message_function not in MESSAGES:
            expected = f"expected one of {', '.join(MESSAGES)}"
            problems.append(f"message_function: found {self.message_function!r}, {expected}")
        for name in ("message", "update"):
            if self.symmetry != "permutation" and getattr(self, name).positions and self.node_positions == "none":
                problems.append(f"{name}.positions: needs node_positions, found none")
        if self.symmetry != "sign" and self.update_rule != "net":
            problems.append(f"update_rule: {self.update_rule} is only {{1, -1}}-equivariant, for sign; use net")
        for name in ("sizes", "equal_outputs", "branch"):
            if self.changes_parameters and (self.branch.reads if name == "branch" else getattr(self, name)):
                found = f"{name}: found {'one' if name == 'branch' else True}"
                problems.append(f"{found}, but changes of parameters have no readout; use vector output or False")
        if self.branch.answers and not self.num_probes:
            problems.append("branch.answers: found True, but num_probes is 0; use probes, or False")
        problems += self._width_problems() if self.width_transfer else []
        problems += self._position_problems() if self.symmetry != "permutation" else []
        self.refuse(problems)

    @property
    def gains_from_bfloat16(self) -> bool:
        """With sign symmetry, whose maps are row programs, and widths that fill tiles of bfloat16 numbers."""
        is_written = self.symmetry == "sign" and self.mlp_activation == "silu" and not self.mlp_dropout
        has_programs = is_written and self.engine == "fast"
        return has_programs and self.hidden_dim % 32 == 0 and native.multiplies_halves()

    @property
    def exact_symmetries(self) -> frozenset[str]:
        """Permutations and the symmetry; of hetero both, each network its own."""
        return frozenset({"permutation", *(("sign", "scale") if self.symmetry == HETERO else (self.symmetry,))})

    def _gradient_problems(self) -> list[str]:
        """What contradicts gradients at probes."""
        found, problems = f"probe_losses: found {self.probe_losses}", []
        if self.probe_losses < 0:
            problems.append(f"{found}, expected 0 or more")
        if not self.num_probes:
            problems.append(f"{found}, but num_probes is 0; use probes, or 0")
        inexact = self.norm_epsilon != 0 if self.direction == "forward" else not self.reciprocal
        if self.symmetry in ("scale", "hetero") and inexact:
            option = "norm_epsilon 0" if self.direction == "forward" else "reciprocal True"
            problems.append(f"{found}, which is exact for scales with {option} alone; use it, or 0")
        return problems

    def _width_problems(self) -> list[str]:
        """What depends on the networks' widths, so that `width_transfer` does not hold."""
        problems = []
        if self.aggregator != "mean":
            problems.append(f"width_transfer: needs aggregator mean, found {self.aggregator}")
        if self.readout == "full_graph":
            problems.append(
                "width_transfer: the sum over all nodes grows with widths, found readout full_graph; use null"
            )
        if self.probe_losses:
            problems.append(
                f"width_transfer: gradients depend on widths, found probe_losses {self.probe_losses}; use 0"
            )
        if self.sizes or self.branch.statistics:
            name = "sizes" if self.sizes else "branch.statistics"
            problems.append(f"width_transfer: sizes of weights depend on widths, found {name} True; use False")
        if self.direction == "bidirectional" and self.symmetry in ("scale", "hetero"):
            found = f"found direction bidirectional with symmetry {self.symmetry}"
            problems.append(f"width_transfer: the floor of reciprocals depends on widths, {found}; use forward")
        return problems

    def _position_problems(self) -> list[str]:
        """What contradicts the choice of positional embeddings."""
        problems = []
        if self.position_map != "none" and self.node_positions == "none" and not self.edge_positions:
            problems.append("position_map: needs node_positions or edge_positions, found none")
        if not self.node_positions.startswith("net"):
            return problems
        if self.symmetry == "hetero":
            problems.append(f"node_positions: a {self.node_positions} of hetero reads no P; use product_sum")
        if not self.position_net.positions:
            problems.append("position_net.positions: found False, but it is a net of (x, P)")
        if self.edge_positions and self.position_net.io not in ("same", "layer"):
            io = self.position_net.io
            problems.append(f"position_net.io: {io} is not equivariant on edges into output nodes; use same or layer")
        return problems

    def build_within(self, spec: NetSpec) -> ScaleGMN:
        """As in `ModelConfig`."""
        depth = self.max_hidden_layers or spec.num_hidden_layers or None
        return replace(self, max_hidden_layers=depth).build(spec)

    def with_readout(self, spec: NetSpec) -> ScaleGMNConfig:
        """The same with the readout that null stands for."""
        default: Literal["last_layer", "full_graph"] = "last_layer" if spec.is_chain else "full_graph"
        return self if self.readout is not None else replace(self, readout=default)

    def build(self, spec: NetSpec) -> ScaleGMN:
        """The model for networks of `spec`; warns if it does not see all of their parameters."""
        model = initialized(self.new_model(spec), self.init, spec)
        model.visibility(spec).warn(
            f"use {self.section}.readout: full_graph, or more layers ({self.section}.num_layers)"
        )
        return model

    def new_model(self, spec: NetSpec) -> ScaleGMN:
        """The model with published initial values."""
        return ScaleGMN(self, spec)


METANETWORKS.register(ScaleGMNConfig.name, ScaleGMNConfig)
