"""The graph of a module's operations: exported, and made plain."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Iterator, Mapping, Sequence, ValuesView
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import OutputKind
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree

from scalegmn.interop.torch_modules.spelling import operation, spell_out

ExampleInput = Tensor | Sequence[Any] | Mapping[str, Any]
"""One input, several in order, or several by name."""

_CONTEXTS = ("wrap_with_autocast", "wrap_with_set_grad_enabled")
"""Operations that run a part of the graph with other settings, which do not change what it computes."""

_ASSERTIONS = (
    *("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range"),
    "sym_constrain_range_for_size",
)
"""Operations that `torch.export` inserts, and that compute nothing."""


def export(
    module: nn.Module, example_input: ExampleInput, output: int | str | None = None, is_strict: bool = True
) -> Any:
    """The program of a module as it evaluates, in a plain form, that returns tensors alone.

    Args:
        module: the network; it is neither changed nor trained.
        example_input: what it is called with.
        output: which of several outputs counts: its place, or its name; None: all.
        is_strict: whether there must be a single one.

    Raises:
        ValueError: the module has no graph, or no such output.
    """
    _check_numbers(module)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example_input, Mapping):
        kwargs = dict(example_input)
    else:
        args = (example_input,) if isinstance(example_input, Tensor) else tuple(example_input)
    drop_caches(module)
    training = [submodule for submodule in module.modules() if submodule.training]
    for submodule in training:
        submodule.training = False
    try:
        with torch.no_grad(), _silence(), _without_stack_traces():
            program = torch.export.export(module, args, kwargs, strict=False)
    except Exception as error:  # whatever the module's own code raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        advice = "; forward chooses by the values of tensors: use torch.where" if "data-dependent" in reason[0] else ""
        raise ValueError(f"{type(module).__name__} cannot be exported: {reason[0]}{advice}") from error
    finally:
        drop_caches(module)  # those that the export has filled hold no numbers
        for submodule in training:
            submodule.training = True
    if any("_add_batch_dim" in str(node.target) for node in program.graph.nodes):
        advice = "use scaled_dot_product_attention (of transformers, attn_implementation='sdpa')"
        raise ValueError(
            f"{type(module).__name__}: computes with vmap, as flex_attention does, which is not read; {advice}"
        )
    _mend_users(program.graph)
    _inline_contexts(program.graph_module)
    spell_out(program)
    _choose_output(program, output, is_strict)
    _remove_dead_code(program.graph_module.graph)
    _merge_equal(program.graph_module.graph)
    return program


def drop_caches(module: nn.Module) -> None:
    """Drops tensors that submodules have computed from their parameters and keep while they evaluate, such as biases of
    attention: those that their own `train` drops."""
    for submodule in module.modules():
        content = {key: value for key, value in vars(submodule).items() if key not in ("_parameters", "_buffers")}
        kept = [value.values() if isinstance(value, dict) else value for value in content.values()]
        lists = [value for value in kept if isinstance(value, ValuesView | list | tuple)]
        holds_tensors = any(isinstance(item, Tensor) for value in lists for item in value)
        if holds_tensors and type(submodule).train is not nn.Module.train:
            modes = {part: part.training for part in submodule.modules()}
            submodule.train()
            for part, mode in modes.items():
                part.training = mode


def _check_numbers(module: nn.Module) -> None:
    """Raises ValueError where numbers are missing, or have a type that PyTorch cannot compute with."""
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name}: found a tensor without numbers (device meta), expected one with numbers")
        if parameter.is_floating_point() and parameter.dtype.itemsize < 2:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise ValueError(f"{name}: found {kind} numbers, expected 16 bits or more; call module.float() first")


def without_parametrizations(module: nn.Module) -> nn.Module:
    """The module itself or, where weights are computed from others (weight norm, spectral norm, pruning masks,
    `torch.nn.utils.parametrize`), a copy that has the computed weights; what `torch.compile` wraps, unwrapped."""
    module = getattr(module, "_orig_mod", module)
    if not any(map(_is_parametrized, module.modules())):
        return module
    plain = _copy(module)
    for submodule in plain.modules():
        if parametrize.is_parametrized(submodule):
            kind = type(submodule)  # shared with the module that is copied, and changed by what follows
            content = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
            submodule.__class__ = type(kind.__name__, kind.__bases__, content)
            with torch.no_grad():
                for name in list(submodule.parametrizations):  # type: ignore[arg-type]
                    parametrize.remove_parametrizations(submodule, name, leave_parametrized=True)
        for hook in _weight_hooks(submodule):
            _remove_hook(submodule, hook)
    return plain


def _is_parametrized(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module) or bool(_weight_hooks(module))


def _weight_hooks(module: nn.Module) -> list[Any]:
    """The hooks of the older ways to compute weights, which run before a module's forward."""
    kinds = (WeightNorm, SpectralNorm, prune.BasePruningMethod)
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, kinds)]


def _remove_hook(module: nn.Module, hook: Any) -> None:
    """Makes the weight that a hook computes a parameter."""
    if isinstance(hook, prune.BasePruningMethod):
        prune.remove(module, hook._tensor_name)
        return
    hook.remove(module)
    for key, other in list(module._forward_pre_hooks.items()):
        if other is hook:
            del module._forward_pre_hooks[key]


def _copy(module: nn.Module) -> nn.Module:
    """A deep copy; weights that hooks have computed with a graph of gradients are copied without it."""
    computed = {
        id(value): value.detach().clone()
        for submodule in module.modules()
        for value in vars(submodule).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(module, dict(computed))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps what the export prints and logs, such as whole graphs before an error, from the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def _without_stack_traces() -> Iterator[None]:
    """Lets the export record no stack traces, which take a fifth of its time, where PyTorch has this setting."""
    name, config = "do_not_emit_stack_traces", torch.fx.config
    before = getattr(config, name, None)
    if before is not None:
        setattr(config, name, True)
    try:
        yield
    finally:
        if before is not None:
            setattr(config, name, before)


def _mend_users(graph: torch.fx.Graph) -> None:
    """Notes all users of each value: `torch.export` forgets some that are given to autocast."""
    for node in graph.nodes:
        for source in node.all_input_nodes:
            source.users.setdefault(node)


def _inline_contexts(module: torch.fx.GraphModule) -> None:
    """Puts the operations of autocast and of gradient modes into the graph that has them."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or operation(node) not in _CONTEXTS:
            continue
        place = next(index for index, arg in enumerate(node.args) if isinstance(arg, torch.fx.Node))
        body = getattr(module, node.args[place].target)
        _inline_contexts(body)
        values: dict[torch.fx.Node, Any] = {}
        inputs = iter(node.args[place + 1 :])
        with graph.inserting_before(node):
            for inner in body.graph.nodes:
                if inner.op == "placeholder":
                    values[inner] = next(inputs)
                elif inner.op == "get_attr" and isinstance(getattr(body, inner.target), Tensor):
                    name = f"{node.name}_{inner.target}"
                    setattr(module, name, getattr(body, inner.target))
                    values[inner] = graph.get_attr(name)
            results = graph.graph_copy(body.graph, values)
        if isinstance(results, tuple | list):
            for user in list(node.users):
                user.replace_all_uses_with(results[user.args[1]])
                graph.erase_node(user)
        else:
            node.replace_all_uses_with(results)
        graph.erase_node(node)


def _choose_output(program: torch.export.ExportedProgram, output: int | str | None, is_strict: bool) -> None:
    """Makes the graph return tensors alone: a single one if `is_strict`."""
    node = next(node for node in program.graph.nodes if node.op == "output")
    specs = program.graph_signature.output_specs
    results = [item for spec, item in zip(specs, node.args[0], strict=True) if spec.kind == OutputKind.USER_OUTPUT]
    spec = program.call_spec.out_spec
    assert spec is not None
    structure = _pytree.tree_unflatten(range(len(results)), spec)
    is_named = isinstance(structure, Mapping)
    names = list(structure) if is_named else list(range(len(structure))) if isinstance(structure, list | tuple) else []
    choices = ", ".join(repr(name) for name in names)
    if output is not None:
        if output not in names:
            raise ValueError(f"output: found {output!r}, expected one of {choices or 'no choice, as there is one'}")
        structure = structure[output]
    tensors = [results[place] for place in _pytree.tree_leaves(structure)]
    tensors = [item for item in tensors if isinstance(item, torch.fx.Node)]
    types = sorted({str(item.meta["val"].dtype).removeprefix("torch.") for item in tensors})
    tensors = [item for item in tensors if item.meta["val"].is_floating_point() or item.meta["val"].is_complex()]
    if types and not tensors:
        raise ValueError(f"expected a module that returns real numbers, found {', '.join(types)}: return its scores")
    if not tensors or (is_strict and len(tensors) > 1):
        found = f"expected a module that returns one tensor, found {len(tensors)}"
        raise ValueError(f"{found}: choose one by output=..., one of {choices}" if choices else found)
    node.args = (tuple(tensors),)


def _merge_equal(graph: torch.fx.Graph) -> None:
    """Makes operations that are applied twice to the same values one, unless memory is changed in place somewhere."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    schemas = [getattr(node.target, "_schema", None) for node in calls]
    if any(schema is not None and schema.is_mutable for schema in schemas):
        return
    first: dict[str, torch.fx.Node] = {}
    for node in calls:
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        key = repr((str(node.target), node.args, node.kwargs))
        same = first.setdefault(key, node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def _remove_dead_code(graph: torch.fx.Graph) -> None:
    """Removes assertions, and operations that nothing reads."""
    for node in reversed(graph.nodes):
        if node.op not in ("call_function", "get_attr") or node.users:
            continue
        schema = getattr(node.target, "_schema", None)
        if operation(node) in _ASSERTIONS or schema is None or not schema.is_mutable:
            graph.erase_node(node)
