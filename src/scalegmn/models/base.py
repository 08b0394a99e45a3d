"""What all metanetworks, and all their configurations, have in common."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from operator import attrgetter, itemgetter
from types import NoneType, UnionType
from typing import ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from scalegmn.engine.memory import networks_at_once
from scalegmn.models.heads import Head, ParametersHead, VectorHead
from scalegmn.models.visibility import Visibility
from scalegmn.networks import NetParams, NetSpec
from scalegmn.nn.normalization import InputNormalization, StatisticsNormalization

ONE_ARCHITECTURE = (
    "changes of parameters have their networks' shapes, found networks of several architectures; "
    "pass one architecture at a time"
)
"""The error of a model with parameter output that is called with several architectures."""


class Metanetwork(nn.Module):
    """A model whose input is a batch of networks.

    `model(NetParams)` gives [B, out_dim] or, with `output: parameters`, `NetParams` of the same shapes as the input:
    the change of every weight and bias; with k `heads`, k changes of each network, side by side (`NetParams.of_heads`).
    `model([NetParams, ...])` and `model(MultiArchBatch)` give [sum of B, out_dim], in order, for networks of several
    architectures, if the model reads them.

    Args:
        config: the hyper-parameters.
        spec: the input networks.
        normalization: of weights and biases, set by `fit_normalization`; None: they are read as they are.
    """

    one_pass: bool = False
    """Whether `forward` also takes batches of several specs, in one pass."""

    engine: Literal["fast", "plain"] = "fast"
    """How `forward` runs: `plain` executes the equations of the modules in `nn` as they are written; `fast` executes
    `scalegmn.engine`'s form of the same modules, with the same parameters. Models with one form ignore it."""

    auxiliary_loss: Tensor | None = None
    """What the last `forward` in training mode adds to the loss, a mean over networks; None: nothing."""

    def __init__(self, config: ModelConfig, spec: NetSpec, normalization: InputNormalization | None) -> None:
        super().__init__()
        self.spec = spec
        self.head = config.head
        self.normalization = normalization
        self.statistics_normalization: StatisticsNormalization | None = None
        self.head.add_parameters(self, spec.num_layers)

    def __call__(self, nets: NetParams | Iterable[NetParams]) -> Tensor | NetParams:
        """The model's output for networks of one architecture, or of several: each as if it were alone.

        Batch norms are folded first (`NetParams.with_batch_norm_folded`).

        Raises:
            ValueError: the model cannot read such networks, their numbers have another type or device than its own, or
                it changes parameters and the networks have several architectures or batch norms.
        """
        run = super().__call__
        if isinstance(nets, NetParams):
            self._check_dtype_and_device(nets)
            output: Tensor | NetParams = run(nets.with_batch_norm_folded())
            if nets.statistics is not None and not isinstance(output, Tensor):
                raise ValueError(
                    "changes of parameters are for networks without batch norms; pass params.with_batch_norm_folded()"
                )
            return output
        folded = [params.with_batch_norm_folded() for params in nets]
        for params in folded:
            self._check_dtype_and_device(params)
        places: dict[NetSpec, list[int]] = {}
        for place, params in enumerate(folded):
            places.setdefault(params.spec, []).append(place)
        by_spec = [NetParams.cat([folded[place] for place in same]) for same in places.values()]
        outputs = [run(by_spec)] if self.one_pass and len(by_spec) > 1 else list(map(run, by_spec))
        if not all(isinstance(output, Tensor) for output in outputs):
            raise ValueError(ONE_ARCHITECTURE)
        order = [place for same in places.values() for place in same]
        rows = torch.split(torch.cat(outputs), [len(folded[place]) for place in order])
        return torch.cat([row for _, row in sorted(zip(order, rows, strict=True), key=itemgetter(0))])

    def _check_dtype_and_device(self, params: NetParams) -> None:
        """Raises ValueError unless networks have the type and device of the model's parameters."""
        expected, given = next(self.parameters(), None), params.biases[0]
        if torch.compiler.is_compiling() or expected is None:
            return
        if (expected.dtype, expected.device) == (given.dtype, given.device):
            return
        target = f"{expected.dtype}" if expected.device == given.device else f'"{expected.device}", {expected.dtype}'
        raise ValueError(
            f"the networks are {given.dtype} on {given.device}, the model's parameters {expected.dtype} on "
            f"{expected.device}; pass params.to({target})"
        )

    def networks_at_once(self, device: torch.device) -> int:
        """How many networks a training step should send through the model at once, the rest of a batch after them."""
        return networks_at_once(self, self.spec, device, self.feature_bytes)

    @property
    def feature_bytes(self) -> int | None:
        """Bytes of one network's features in one layer, for models that are fastest while those of all networks that
        pass at once stay in cache; None: only the memory that a backward pass keeps decides."""
        return None

    def validate_spec(self, spec: NetSpec) -> None:
        """Raises ValueError unless the model can read networks of `spec`. Here: if their parameters have the shapes
        that it was built for."""
        if [layer.weight_shape for layer in spec.layers] != [layer.weight_shape for layer in self.spec.layers]:
            raise ValueError(f"the model was built for {self.spec}, found {spec}")

    def visibility(self, spec: NetSpec) -> Visibility:
        """Which parameters of networks of `spec` the output depends on. Here: all."""
        return Visibility.whole(spec)

    def joined_heads(self, of_heads: Sequence[NetParams]) -> NetParams:
        """The changes of parameters, from those of each head, before each layer's learned factor (`ParametersHead`)."""
        assert isinstance(self.head, ParametersHead)
        return self.head.changes(self, of_heads)

    def fit_normalization(self, batches: Iterable[NetParams]) -> None:
        """Sets the normalisation of inputs and that of `statistics`, where the model has them, from batches of training
        networks, which are read once."""
        rows: list[Tensor] = []

        def read() -> Iterator[tuple[Sequence[Tensor], Sequence[Tensor]]]:
            for params in batches:
                folded = params.with_batch_norm_folded()
                if self.statistics_normalization is not None:
                    rows.append(self.statistics(folded))
                yield folded.weights, folded.biases

        if self.normalization is not None:
            self.normalization.fit(read())
        elif self.statistics_normalization is not None:
            deque(read(), maxlen=0)
        if self.statistics_normalization is not None:
            self.statistics_normalization.fit(torch.cat(rows))

    def statistics(self, params: NetParams) -> Tensor:
        """What `statistics_normalization` standardises, [B, S], NaN where a network has none."""
        raise NotImplementedError

    def normalized(self, params: NetParams) -> NetParams:
        """The networks as the model reads them."""
        if self.normalization is None:
            return params
        weights, biases = self.normalization(params.weights, params.biases)
        return params.replace(weights=tuple(weights), biases=tuple(biases))


@dataclass(frozen=True)
class ModelConfig:
    """A metanetwork's hyper-parameters; `build` makes the module for one kind of input network."""

    name: ClassVar[str]
    """What a configuration calls the model: `model: <name>`, with the section `<name>_args`."""

    supports_multiple_architectures: ClassVar[bool] = False
    """Whether the model reads networks of several architectures."""

    output: Literal["vector", "parameters"] = "vector"
    """vector: out_dim numbers per network, invariant; parameters: a change of every weight and bias, equivariant."""

    out_dim: int = 10
    """For vectors: outputs per network, such as the number of classes."""

    out_scale: float = 0.01
    """For parameters: the learned factor of each layer's changes starts here."""

    heads: int = 1
    """For parameters: k changes of each network; an edited image is the mean of those that the k changed networks
    draw."""

    normalize: bool | None = None
    """Subtract from each layer's weights, and from its biases, their mean over the training split, and divide by their
    standard deviation; null: as the model was published."""

    @property
    def head(self) -> Head:
        """What the model gives for each network."""
        return ParametersHead(self.out_scale, self.heads) if self.changes_parameters else VectorHead(self.out_dim)

    @property
    def changes_parameters(self) -> bool:
        """Whether the output is a change of every parameter, rather than a vector."""
        return self.output == "parameters"

    @property
    def gains_from_bfloat16(self) -> bool:
        """Whether training on this machine's CPU takes less time with products in bfloat16, and is as good; what
        `train_args.precision: auto` asks."""
        return False

    @property
    def exact_symmetries(self) -> frozenset[str]:
        """The symmetries of input networks that the model keeps exactly, of `permutation`, `sign`, `scale`, `phase` and
        `basis`."""
        raise NotImplementedError

    @property
    def section(self) -> str:
        """The model's section in a configuration."""
        return f"{self.name}_args"

    def refuse(self, problems: Sequence[str]) -> None:
        """Raises ValueError with all problems, each of which starts with a field, if there are any."""
        if problems:
            raise ValueError("; ".join(f"{self.section}.{problem}" for problem in problems))

    def wrong_numbers(self, counts: Sequence[str], probabilities: Sequence[str] = ()) -> list[str]:
        """One sentence per field (`section.field` inside sections) that is neither null nor a count from 1, or not a
        probability below 1; also about `heads`."""
        problems = []
        if self.heads > 1 and not self.changes_parameters:
            problems.append(f"heads: found {self.heads}, but a vector has one; use 1, or output parameters")
        for name in ("heads", *counts):
            count = attrgetter(name)(self)
            if count is not None and count < 1:
                problems.append(f"{name}: found {count}, expected at least 1")
        for name in probabilities:
            if not 0 <= attrgetter(name)(self) < 1:
                problems.append(f"{name}: found {attrgetter(name)(self)}, expected a probability in [0, 1)")
        return problems

    def wrong_choices(self) -> list[str]:
        """One sentence per field whose value is not one of its named ones, also inside sections."""
        problems = []
        for section, prefix in ((self, ""), *((getattr(self, f.name), f"{f.name}.") for f in fields(self))):
            for name, hint in get_type_hints(type(section)).items() if is_dataclass(section) else ():
                value = getattr(section, name)
                kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
                choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
                if choices and value not in (*choices, *([None] if NoneType in kinds else [])):
                    problems.append(f"{prefix}{name}: found {value!r}, expected one of {tuple(choices)}")
        return problems

    def wrong_for(self, choice: str, **needed: object) -> list[str]:
        """One sentence per field that has another value than `choice` (of another field) needs."""
        values = ((name, getattr(self, name), value) for name, value in needed.items())
        return [f"{name}: found {own}, expected {value} for {choice}" for name, own, value in values if own != value]

    def wrong_output(self, reason: str) -> list[str]:
        """One sentence if the output is not a vector, for models that give nothing else; `reason` says why."""
        return [] if self.output == "vector" else [f"output: found {self.output}, but {reason}; use vector"]

    def check_output(self, output: str, task: str, out_dim: int | None = None) -> None:
        """Raises ValueError unless the model gives what a task needs.

        Args:
            output: `vector` or `parameters`.
            task: its name, for the message.
            out_dim: how many numbers per network it needs; None: any.
        """
        self.refuse(self.head.problems(output, task, out_dim))

    def refuse_residuals(self, spec: NetSpec) -> None:
        """Raises ValueError for networks with residual connections, for models that do not read them."""
        self.refuse_graphs(spec)
        if spec.residuals:
            models = "scalegmn, ng_gnn, ng_t, statnn or probegen"
            raise ValueError(f"model: {self.name} knows of no residual connections, found {spec}; use {models}")

    def refuse_graphs(self, spec: NetSpec) -> None:
        """Raises ValueError for networks that are no chains of linear layers and convolutions."""
        if not spec.is_chain:
            raise ValueError(f"model: {self.name} reads chains, found {spec}; use scalegmn, ng_gnn, ng_t or statnn")

    def build(self, spec: NetSpec) -> Metanetwork:
        """The model for input networks of `spec`.

        Raises:
            ValueError: the configuration does not fit these networks; the message names what does.
        """
        raise NotImplementedError

    def build_within(self, spec: NetSpec) -> Metanetwork:
        """The model for networks of all architectures that `spec` covers (`NetSpec.envelope`).

        Raises:
            ValueError: the configuration does not fit these networks.
        """
        return self.build(spec)

    def build_for(self, architectures: Mapping[NetSpec, int]) -> Metanetwork:
        """The model for a zoo's networks: for one architecture as `build` makes it, for several as `build_within`.

        Args:
            architectures: all that the model is to read, and how many training networks have them.

        Raises:
            ValueError: the model cannot read one of them.
        """
        if len(architectures) == 1:
            return self.build(*architectures)
        if not self.supports_multiple_architectures:
            problem = f"{self.name} reads networks of one architecture, found {len(architectures):,}"
            raise ValueError(f"model: {problem}; use scalegmn, ng_gnn, ng_t, statnn or probegen")
        model = self.build_within(NetSpec.envelope(architectures))
        for spec in architectures:
            model.validate_spec(spec)
        return model
