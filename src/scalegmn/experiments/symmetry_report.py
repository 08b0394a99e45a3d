"""`scalegmn symmetry --conf FILE | --checkpoint RUN`: does a model keep the symmetries that it claims?

For each symmetry, the largest change of the output over random group elements, relative to the spread between different
networks, in float32 and float64; beside a control outside every group. Models that change parameters must change moved
networks alike: their output is moved back before it is compared. Exit code 1 if a claimed symmetry is broken.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from scalegmn.experiments.config import Config
from scalegmn.experiments.trained import weights_file
from scalegmn.interop.torch_modules import FACTORY, ExampleInput, from_factory
from scalegmn.models.base import Metanetwork
from scalegmn.models.visibility import least_visible
from scalegmn.networks import HETERO, MultiArchBatch, NetParams, linear_products
from scalegmn.symmetry.canonicalize import TO_CANONICAL, canonicalize
from scalegmn.symmetry.groups import BasisChange, GroupElement, PhaseShift
from scalegmn.symmetry.measure import relative_change
from scalegmn.training.checkpoint import load_checkpoint
from scalegmn.zoos.loader import load_splits
from scalegmn.zoos.zoo_format import joined

NETWORKS, MADE, DRAWS = 32, 8, 5
"""Networks of a zoo, networks that a factory makes, random elements of each group."""

TOLERANCE = 1e-9
"""The largest relative change in float64 at which a symmetry counts as kept; float32 is shown, not judged."""


@dataclass(frozen=True)
class CheckConfig(Config):
    """Check the symmetries of a model on networks of its zoo."""

    checkpoint: str | None = None
    """A run folder or bundle: check its model, with its configuration; null: a model as it is at the start."""

    modules: str | None = None
    """package.module:factory, your own code, which is run: check the model on networks that it makes instead of a
    zoo's. A function without arguments that returns an nn.Module, another one at each call."""

    input_shape: str | None = None
    """Of an input of these networks, such as 1,3,32,32."""

    words: int | None = None
    """The input of these networks consists of whole numbers below this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.modules is None) != (self.input_shape is None):
            raise ValueError("--modules and --input_shape go together: package.module:factory, and such as 1,3,32,32")
        if self.modules is not None and not re.fullmatch(FACTORY, self.modules):
            raise ValueError(f"--modules: found {self.modules}, expected package.module:factory")
        if self.modules is not None and self.checkpoint is not None:
            raise ValueError("--modules: checks a model as it is at the start; leave --checkpoint out")
        if self.modules is None and self.words is not None:
            raise ValueError("--words: is about networks of --modules; leave it out")
        _ = self.example

    @property
    def example(self) -> ExampleInput:
        """An input of the networks of `modules`."""
        return ExampleInput.parse(self.input_shape, self.words)

    @property
    def removed(self) -> tuple[str, ...]:
        """The symmetries that networks have removed when the model reads them."""
        return self.data.canonicalize if self.data.switch_to_canon else ()


def made_networks(factory: str, example: ExampleInput, num: int) -> NetParams | MultiArchBatch:
    """So many networks that the user's code makes, each call after another seed.

    Raises:
        ValueError: the code fails, or makes no differing networks.
    """
    made = []
    for seed in range(num):
        torch.manual_seed(seed)
        made.append(from_factory(factory, example).map(Tensor.float))
    params = MultiArchBatch.of(joined(made))
    if isinstance(params, NetParams) and (params.flatten() == params[:1].flatten()).all():
        raise ValueError(f"--modules: {factory} makes the same network at each call, expected other weights each time")
    return params


Element = GroupElement | PhaseShift | BasisChange
"""A group element for networks of one architecture."""


def elements(params: NetParams | MultiArchBatch, generator: torch.Generator) -> dict[str, list[Element | None]]:
    """A random element of each group, and an element outside all groups (`control`), for the networks of each
    architecture; None where they have no such group."""
    by_architecture = [_elements(part, generator) for part in params.parts]
    groups = dict.fromkeys(name for drawn in by_architecture for name in drawn if name != "control")
    return {name: [drawn.get(name) for drawn in by_architecture] for name in (*groups, "control")}


def _elements(params: NetParams, generator: torch.Generator) -> dict[str, Element]:
    """`elements` of one architecture."""
    scaled = GroupElement.sample(params, generator, permute=False, decades=3.0)
    outside = replace(scaled, scales=tuple(torch.full_like(q, -1.7) for q in scaled.scales))
    drawn: dict[str, Element] = {"permutation": GroupElement.sample(params, generator, scale=False)}
    if any((q != 1).any() for q in scaled.scales):
        kinds = {*params.spec.symmetries} - {"permutation"}
        drawn[kinds.pop() if len(kinds) == 1 else HETERO] = scaled
    phase = PhaseShift.sample(params, generator)
    if any(k.any() for k in phase.turns):
        drawn["phase"] = phase
    if any(len(product) > 1 for product in linear_products(params.spec)):  # which has all scalars
        drawn["basis"] = basis = BasisChange.sample(params, generator)
        return drawn | {"control": replace(basis, inverses=basis.bases)}
    return drawn | {"control": outside}


Model = Callable[[NetParams | MultiArchBatch], Tensor | NetParams]
"""Networks -> [B, ...], or changes of their parameters."""


def outputs_on(
    model: Model, params: NetParams | MultiArchBatch, removed: Sequence[str], *elements: Element | None
) -> list[Tensor]:
    """Outputs of a model for the networks g w, moved back: for a symmetric model the same numbers for every element g.

    The model reads x = c g w, c what leads to canonical networks. A vector f(x) is compared as it is. Changes of
    parameters are changes of x; (c g)^-1 makes them changes of w.

    Args:
        model: f.
        params: w.
        removed: the symmetries that canonical networks have removed.
        elements: g, for the networks of each architecture; None, or no elements at all: the identity.

    Returns:
        One tensor [B, ...]; for changes of parameters, one per head, layer and kind.
    """
    read, passed = [], []
    for x, element in zip(params.parts, elements or [None] * len(params.parts), strict=True):
        passed.append([] if element is None else [element])
        x = x if element is None else element.act(x)
        for name in removed:
            passed[-1].append(TO_CANONICAL[name](x))
            x = passed[-1][-1].act(x)
        read.append(x)
    output = model(MultiArchBatch.of(read))
    if isinstance(output, Tensor):
        return [output]
    (own,), of_heads = passed, output.of_heads(len(read[0]))
    for last in reversed(own):
        of_heads = list(map(last.inverse().act_on_changes, of_heads))
    return [tensor for changes in of_heads for tensor in (*changes.weights, *changes.biases)]


@torch.no_grad()
def report(
    model: Model, params: NetParams | MultiArchBatch, generator: torch.Generator, removed: Sequence[str] = ()
) -> dict[str, float]:
    """Per group, the largest change of the output over `DRAWS` elements, relative to the spread between networks.

    Each layer's changes of parameters have their own spread: they differ in size by many decades. Changes that are the
    same for all networks say nothing, and give NaN.
    """
    outputs = outputs_on(model, params, removed)
    changes: dict[str, list[float]] = {}
    for _ in range(DRAWS):
        for name, own in elements(params, generator).items():
            moved = outputs_on(model, params, removed, *own)
            changes.setdefault(name, []).extend(map(relative_change, moved, outputs))
    return {name: torch.tensor(found).max().item() for name, found in changes.items()}  # NaN stays


def model_and_networks(config: CheckConfig) -> tuple[Metanetwork, NetParams | MultiArchBatch]:
    """The model of a configuration, or of its run, and the networks to measure it on.

    Raises:
        ValueError: the zoo, the factory or the run cannot be read, or the model cannot read the networks.
    """
    removed = config.removed
    if config.modules is None:
        zoo, splits = load_splits(replace(config.data, switch_to_canon=False))
        nets, architectures = splits["test"], zoo.architectures
        stored: Iterable[NetParams] = (part for batch, _ in splits["train"].batches() for part in batch.parts)
        rows = torch.linspace(0, len(nets) - 1, min(NETWORKS, len(nets))).long()  # of all architectures
        params = nets.read(rows)
    else:
        params = made_networks(config.modules, config.example, MADE)
        stored, architectures = params.parts, Counter()
        for part in params.parts:
            architectures[part.spec] += len(part)
    torch.manual_seed(config.train_args.seed)
    model = config.model_config.build_for(architectures).eval()
    model.fit_normalization(canonicalize(part, removed) for part in stored)
    if config.checkpoint is not None:
        load_checkpoint(weights_file(Path(config.checkpoint)), model)
    return model, params


def measure(config: CheckConfig) -> tuple[str, list[str]]:
    """The table of a model's symmetries, and the names of those that it claims and does not keep.

    Raises:
        ValueError: as `model_and_networks`.
    """
    model, params = model_and_networks(config)
    claimed = {*config.model_config.exact_symmetries, *config.removed}
    claimed |= {HETERO} if claimed >= {"sign", "scale"} else set()
    changes = {}
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        changes[dtype] = report(model, params.to(dtype), torch.Generator().manual_seed(0), config.removed)
    header = f"{'':<16}{'claimed':>8}{'float32':>10}{'float64':>10}   change / spread between {len(params)} networks"
    lines, broken = [header], []
    for name, change in changes[torch.float64].items():
        kept = change <= TOLERANCE
        verdict = "" if name not in claimed else "   kept" if kept else "   BROKEN"
        broken += [name] if verdict.strip() == "BROKEN" else []
        claim, single = "yes" if name in claimed else "no", changes[torch.float32][name]
        lines.append(f"{name:<16}{claim:>8}{single:>10.1e}{change:>10.1e}{verdict}")
    if all(part.spec.num_layers == 1 for part in params.parts):
        lines.append("the networks have no hidden neurons: all elements, and the control, are the identity")
    lines.append(f"the model sees {least_visible(model, (part.spec for part in params.parts))} of the networks")
    return "\n".join(lines), broken
