"""What every metanetwork and its configuration have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from operator import attrgetter, itemgetter
from typing import ClassVar, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from scalegmn.networks import NetParams, NetSpec
from scalegmn.nn.normalization import InputNormalization

ONE_ARCHITECTURE = "changes of parameters have their networks' shapes; pass one architecture at a time"
"""What is said of a call with several, where they are asked for."""


class Metanetwork(nn.Module):
    """A model whose input is a batch of networks.

    `model(NetParams)` gives [B, out_dim] or, with `output: parameters`, the changes of weights and of biases, per layer
    in the shapes of the parameters. `model([NetParams, ...])`, or `model(MultiArchBatch)`, gives [sum of B, out_dim] of
    networks of several architectures, in order, if the model reads them.

    Args:
        spec: the input networks.
        normalization: of weights and biases, set by `fit_normalization`; None: they are read as they are.
    """

    one_pass: ClassVar[bool] = False
    """Whether `forward` also takes batches of several specs, in one pass."""

    def __init__(self, spec: NetSpec, normalization: InputNormalization | None) -> None:
        super().__init__()
        self.spec = spec
        self.normalization = normalization

    def __call__(self, nets: NetParams | Iterable[NetParams]) -> Tensor | tuple[list[Tensor], list[Tensor]]:
        """What the model says of networks of one architecture, or of several: each as alone, all in one pass, or those
        of equal specs.

        Raises:
            ValueError: the model cannot read such networks, or changes of parameters are asked for of several
                architectures or of networks with batch norms.
        """
        run = super().__call__
        if isinstance(nets, NetParams):
            output = run(nets.with_batch_norm_folded())
            if nets.statistics is not None and not isinstance(output, Tensor):
                raise ValueError(
                    "changes of parameters are for networks without batch norms; pass params.with_batch_norm_folded()"
                )
            return output
        nets = [params.with_batch_norm_folded() for params in nets]
        places: dict[NetSpec, list[int]] = {}
        for place, params in enumerate(nets):
            places.setdefault(params.spec, []).append(place)
        parts = [NetParams.cat([nets[place] for place in own]) for own in places.values()]
        together = self.one_pass and len(parts) > 1
        outputs = [run(parts)] if together else list(map(run, parts))
        if not all(isinstance(output, Tensor) for output in outputs):
            raise ValueError(ONE_ARCHITECTURE)
        order = [place for own in places.values() for place in own]
        found = torch.cat(outputs).split([len(nets[place]) for place in order])
        return torch.cat([output for _, output in sorted(zip(order, found, strict=True), key=itemgetter(0))])

    def networks_at_once(self, device: torch.device) -> int:
        """How many networks a training step should pass through the model at once, the rest of a batch after them."""
        raise NotImplementedError

    def validate_spec(self, spec: NetSpec) -> None:
        """Raises ValueError unless the model can read networks of `spec`. Here: if their parameters have the shapes
        that it was built for."""
        if [layer.weight_shape for layer in spec.layers] != [layer.weight_shape for layer in self.spec.layers]:
            raise ValueError(f"the model was built for {self.spec}, found {spec}")

    def add_scales(self, start: float) -> None:
        """Learned factors of each layer's changes of weights and of biases."""
        self.weight_scales = nn.Parameter(torch.full((self.spec.num_layers,), start))
        self.bias_scales = nn.Parameter(torch.full((self.spec.num_layers,), start))

    def scaled(self, changes: NetParams) -> tuple[list[Tensor], list[Tensor]]:
        """Changes of weights and of biases, each times the factor of its layer."""
        return (
            [change * scale for change, scale in zip(changes.weights, self.weight_scales, strict=True)],
            [change * scale for change, scale in zip(changes.biases, self.bias_scales, strict=True)],
        )

    def fit_normalization(self, batches: Iterable[NetParams]) -> None:
        """Sets the normalisation, if the model has one, from batches of training networks."""
        if self.normalization is not None:
            folded = (params.with_batch_norm_folded() for params in batches)
            self.normalization.fit((params.weights, params.biases) for params in folded)

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

    normalize: bool | None = None
    """Subtract from each layer's weights, and from its biases, their mean over the training split, and divide by their
    standard deviation; null: as the model was published."""

    @property
    def exact_symmetries(self) -> frozenset[str]:
        """The symmetries of input networks that the model keeps exactly: `permutation`, `sign`, `scale`, `phase`."""
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
        """One sentence per field (`section.field` inside sections) that is no count from 1, unless null, or no
        probability of dropping something."""
        problems = []
        for name in counts:
            count = attrgetter(name)(self)
            if count is not None and count < 1:
                problems.append(f"{name}: found {count}, expected at least 1")
        for name in probabilities:
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"{name}: found {getattr(self, name)}, expected a probability in [0, 1)")
        return problems

    def wrong_choices(self) -> list[str]:
        """One sentence per field whose value is not one of its named ones, also inside sections."""
        problems = []
        for section, prefix in ((self, ""), *((getattr(self, f.name), f"{f.name}.") for f in fields(self))):
            for name, hint in get_type_hints(type(section)).items() if is_dataclass(section) else ():
                value = getattr(section, name)
                if get_origin(hint) is Literal and value not in get_args(hint):
                    problems.append(f"{prefix}{name}: found {value!r}, expected one of {get_args(hint)}")
        return problems

    def check_output(self, output: str, task: str, out_dim: int | None = None) -> None:
        """Raises ValueError unless the model gives what a task needs."""
        problems = [] if self.output == output else [f"output: found {self.output}, but {task} needs {output}"]
        if out_dim is not None and self.out_dim != out_dim:
            problems.append(f"out_dim: found {self.out_dim}, but {task} needs {out_dim}")
        self.refuse(problems)

    def refuse_residuals(self, spec: NetSpec) -> None:
        """Raises ValueError for networks with residual connections, which not every model knows of."""
        self.refuse_graphs(spec)
        if spec.residuals:
            models = "scalegmn, ng_gnn, ng_t, statnn or probegen"
            raise ValueError(f"model: {self.name} knows of no residual connections, found {spec}; use {models}")

    def build_for(self, architectures: Mapping[NetSpec, int]) -> Metanetwork:
        """The model for a zoo's networks: for one architecture as `build` makes it, for several as `build_within`.

        Args:
            architectures: all that the model is to read, and how many training networks have them.

        Raises:
            ValueError: it cannot read one of them.
        """
        if len(architectures) == 1:
            return self.build(*architectures)
        if not self.supports_multiple_architectures:
            found = f"{self.name} reads networks of one architecture, found {len(architectures):,}"
            raise ValueError(f"model: {found}; use scalegmn, ng_gnn, ng_t, statnn or probegen")
        model = self.build_within(NetSpec.envelope(architectures))
        for spec in architectures:
            model.validate_spec(spec)
        return model

    def build_within(self, spec: NetSpec) -> Metanetwork:
        """The model for networks of all architectures that `spec` covers (`NetSpec.envelope`).

        Raises:
            ValueError: the configuration does not fit these networks.
        """
        return self.build(spec)

    def refuse_graphs(self, spec: NetSpec) -> None:
        """Raises ValueError for networks that are no chains of linear layers and convolutions."""
        if not spec.is_chain:
            raise ValueError(f"model: {self.name} reads chains, found {spec}; use scalegmn, ng_gnn, ng_t or statnn")

    def build(self, spec: NetSpec) -> Metanetwork:
        """The model for input networks of `spec`.

        Raises:
            ValueError: the configuration does not fit these networks; says what does.
        """
        raise NotImplementedError
