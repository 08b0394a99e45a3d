"""What ScaleGMN is built from, by its options."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from scalegmn.networks import HETERO, NetSpec
from scalegmn.networks.scalar_groups import SCALES, SIGNS, TRIVIAL, ScalarGroup
from scalegmn.nn.equivariant import ByRole, EquivariantLayer, EquivariantNet, MLPLayer, SineUpdate
from scalegmn.nn.invariant import (
    AbsoluteValue,
    ByScalarGroup,
    InvariantLayer,
    Normalized,
    ScaleInvariant,
    SignInvariant,
)
from scalegmn.nn.messages import MESSAGES, ConcatEdgeUpdate, MessageFunction, MessageParts, ScaleEdgeUpdate
from scalegmn.nn.mlp import MLP
from scalegmn.nn.positional import TypedLinear
from scalegmn.nn.readout import DeepSetReadout, EndsReadout, EqualOutputs, GraphReadout, OutputReadout

if TYPE_CHECKING:
    from scalegmn.models.scalegmn.config import EquivariantNetConfig, ScaleGMNConfig


def scalar_groups(config: ScaleGMNConfig, spec: NetSpec) -> tuple[ScalarGroup, ...]:
    """The scalar groups for which a model has branches.

    One group for the symmetries sign ({-1, 1}), scale (the positive reals) and permutation ({1}). A hetero model has
    branches for {-1, 1}, which neurons without scalars share, for the positive reals, and for every other group among
    the activations of `spec`. Where each network has an activation of its own (`spec.is_hetero`), these are
    `spec.activations`, whatever else is registered.
    """
    if config.symmetry != "hetero":
        return ({"sign": SIGNS, "scale": SCALES, "permutation": TRIVIAL}[config.symmetry],)
    names = spec.activations if spec.is_hetero else [HETERO]
    groups = {spec.class_symmetry(channels, name) for channels in spec.scaling_classes for name in names}
    further = {group for group in groups if isinstance(group, ScalarGroup)} - {TRIVIAL, SIGNS, SCALES}
    return (SIGNS, SCALES, *sorted(further, key=branch_name))


def branch_name(group: ScalarGroup) -> str:
    """The name of a group's branch in state dicts of hetero models: `sign`, `scale`, or for other groups which scalars
    they have and the exponents of chi(q): `sign0_scale2` for z^2."""
    if group in (TRIVIAL, SIGNS):
        return "sign"
    if group == SCALES:
        return "scale"
    sign = f"sign{group.sign_exponent}" if group.signs else ""
    scale = f"scale{group.exponent:g}".replace(".", "_").replace("-", "minus") if group.scales else ""
    return "_".join(part for part in (sign, scale) if part)


@dataclass(frozen=True)
class ModuleBuilder:
    """Builds the modules of a model: which class of `scalegmn.nn` each option stands for.

    Attributes:
        config: the model's options.
        groups: the scalar groups for which it has branches (`scalar_groups`).
    """

    config: ScaleGMNConfig
    groups: tuple[ScalarGroup, ...]

    @property
    def symmetric(self) -> bool:
        """Whether the model respects scalars."""
        return self.config.symmetry != "permutation"

    def mlp(self, in_dim: int, out_dim: int) -> MLP:
        """An MLP of the configured hidden widths, activation, normalisation and dropout."""
        options = self.config
        hidden_dims = options.mlp_dims or (options.hidden_dim,)
        return MLP(in_dim, hidden_dims, out_dim, options.mlp_activation, options.mlp_layer_norm, options.mlp_dropout)

    def map_of(self, group: ScalarGroup, dim: int) -> nn.Module:
        """The invariant map of one scalar group: normalised where it has scales, then symmetrised where it has
        signs."""
        sign, scale = SignInvariant, ScaleInvariant(self.config.norm_epsilon)
        if group.scales and not group.signs:
            return scale
        symmetric = sign(dim, self.mlp) if self.config.sign_map == "symmetrized" else AbsoluteValue()
        return Normalized(scale, symmetric) if group.scales else symmetric

    def invariant(self, dim: int) -> nn.Module:
        """The invariant map of the symmetry."""
        if len(self.groups) == 1:
            return self.map_of(self.groups[0], dim)
        return ByScalarGroup(self.groups, {branch_name(group): self.map_of(group, dim) for group in self.groups})

    def invariant_layer(self, in_dim: int, extra_dim: int, out_dim: int) -> nn.Module:
        """g(x, p); for hetero one per scalar group, without p."""
        if len(self.groups) == 1:
            return InvariantLayer(in_dim, extra_dim, out_dim, self.invariant, self.mlp)

        def layer(group: ScalarGroup) -> InvariantLayer:
            return InvariantLayer(in_dim, 0, out_dim, lambda dim: self.map_of(group, dim), self.mlp)

        return ByScalarGroup(self.groups, {branch_name(group): layer(group) for group in self.groups})

    def net(self, options: EquivariantNetConfig, in_dim: int, out_dim: int, roles: Collection[str]) -> nn.Module:
        """MSG or UPD for rows of the given roles."""
        if not self.symmetric:
            return MLPLayer(in_dim, out_dim, self.mlp)
        extra_dim = self.config.hidden_dim if options.positions else 0
        widths = [in_dim] + [out_dim] * options.num_layers
        skips = [nn.Linear(width, out_dim, bias=False) for width in widths[:-1]] if options.skip_connections else []
        layers = [self._equivariant_layer(options, width, extra_dim, out_dim, roles) for width in widths[:-1]]
        return EquivariantNet(layers, skips)

    def _equivariant_layer(
        self, options: EquivariantNetConfig, width: int, extra_dim: int, out_dim: int, roles: Collection[str]
    ) -> nn.Module:
        """One layer of an equivariant net, with what rows of input and output nodes do instead."""

        def by_role(hidden: nn.Module, io: list[nn.Module]) -> ByRole:
            return ByRole({"input": io[0], "hidden": hidden, "output": io[-1]}, roles)

        def equivariant() -> EquivariantLayer:
            return EquivariantLayer(width, out_dim, self.invariant_layer(width, extra_dim, out_dim))

        branches = range(options.io_branches)
        if options.io == "same":
            return equivariant()
        if options.io == "layer":
            return by_role(equivariant(), [equivariant() for _ in branches])
        io: list[nn.Module] = [MLPLayer(width + extra_dim, out_dim, self.mlp) for _ in branches]
        if options.io == "mlp":
            return by_role(equivariant(), io)
        factor = by_role(self.invariant_layer(width, extra_dim, out_dim), io)
        return EquivariantLayer(width, out_dim, factor)

    def position_net(self, roles: Collection[str]) -> nn.Module | None:
        """The net of a feature and its positional embedding, if there is one."""
        if not self.symmetric or not self.config.node_positions.startswith("net"):
            return None
        return self.net(self.config.position_net, self.config.hidden_dim, self.config.hidden_dim, roles)

    def position_map(self, num_types: int) -> TypedLinear | None:
        """The linear map after the positional embeddings, if there is one."""
        if not self.symmetric or self.config.position_map == "none":
            return None
        return TypedLinear(1 if self.config.position_map == "shared" else num_types, self.config.hidden_dim)

    def message(self, roles: Collection[str]) -> MessageFunction:
        """The message function towards nodes of the given roles."""

        def net(in_dim: int, out_dim: int) -> nn.Module:
            return self.net(self.config.message, in_dim, out_dim, roles)

        name = self.config.message_function or ("scale" if self.symmetric else "concat")
        return MESSAGES[name](MessageParts(self.config.hidden_dim, self.mlp, self.invariant, net))

    def update(self, num_parts: int, out_dim: int, roles: Collection[str]) -> nn.Module:
        """The update function of `num_parts` parts [x, m...] for nodes of the given roles."""
        if self.config.update_rule != "net":
            return SineUpdate(num_parts, self.config.hidden_dim, out_dim, self.config.update_rule == "sine_sum")
        return self.net(self.config.update, num_parts * self.config.hidden_dim, out_dim, roles)

    def edge_update(self, out_dim: int) -> nn.Module:
        """The edge update."""
        if not self.symmetric:
            return ConcatEdgeUpdate(self.config.hidden_dim, out_dim, self.mlp)
        return ScaleEdgeUpdate(self.config.hidden_dim, out_dim, self.invariant, self.mlp)

    def readout(self, num_inputs: int, num_outputs: int, num_statistics: int) -> nn.Module:
        """The readout of a model with vector output, which also reads so many statistics of a network."""
        d = self.config.hidden_dim
        if self.config.equal_outputs:
            return EqualOutputs(self._readout(num_inputs, 1, num_statistics), d, self.mlp)
        return self._readout(num_inputs, num_outputs, num_statistics)

    def _readout(self, num_inputs: int, num_outputs: int, num_statistics: int) -> nn.Module:
        """`readout` of outputs that are told apart."""
        options, d = self.config, self.config.hidden_dim
        readout_dim = options.readout_dim or d
        if options.readout == "last_layer" and options.direction == "forward":
            return OutputReadout(d, num_outputs, options.out_dim, self.mlp, num_statistics)
        if options.readout == "last_layer":
            project = nn.Linear if options.readout_projection == "linear" else self.mlp
            return EndsReadout(d, num_inputs, num_outputs, options.out_dim, project, self.mlp, num_statistics)
        if not self.symmetric:
            return DeepSetReadout(d, readout_dim, options.out_dim, self.mlp, num_statistics)
        invariant_layer = self.invariant_layer(d, 0, readout_dim)
        return GraphReadout(
            d, num_inputs + num_outputs, invariant_layer, readout_dim, options.out_dim, self.mlp, num_statistics
        )
