"""Questions about the nodes of an exported graph."""

from __future__ import annotations

import torch
from torch import nn

from scalegmn.interop.torch_modules.operators.views import UNCHANGED, VIEWS
from scalegmn.interop.torch_modules.program import operation


def is_random(node: torch.fx.Node) -> bool:
    """Whether an operation draws random numbers, as a dropout does that is not switched off."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    options = {argument.name: argument.default_value for argument in arguments}
    options |= dict(zip(options, node.args, strict=False)) | node.kwargs
    is_training = options.get("train", options.get("training", True))
    share = options.get("dropout_p", options.get("p", 1)) if is_training else 0
    return share != 0


def is_read_by_others(node: torch.fx.Node) -> bool:
    """Whether other operations than views read a value, not the module's output alone."""
    views = (*VIEWS, *UNCHANGED)
    return any(user.op != "output" and (operation(user) not in views or is_read_by_others(user)) for user in node.users)


def is_rounded(node: torch.fx.Node) -> bool:
    """Whether an operation makes floating point numbers of 64 bits shorter: in double precision, what is claimed holds
    to 1e-9."""
    dtypes = [getattr(item.meta.get("val"), "dtype", None) for item in (node, *node.all_input_nodes)]
    is_short = dtypes[0] in (torch.float32, torch.float16, torch.bfloat16)
    return is_short and torch.float64 in dtypes[1:]


def is_read_elsewhere(node: torch.fx.Node) -> bool:
    """Whether others read what an operation reads, or what that is a view or a multiple of."""
    source = node.args[0] if node.args else None
    while isinstance(source, torch.fx.Node):
        if len(source.users) > 1:
            return True
        if operation(source) not in (*VIEWS, "mul", "div", "neg") or source.op != "call_function":
            return False
        source = next((item for item in source.args if isinstance(item, torch.fx.Node)), None)
    return False


def changed_argument(node: torch.fx.Node) -> torch.fx.Node | None:
    """The argument whose memory an operation changes."""
    schema = getattr(node.target, "_schema", None)
    for argument, value in zip(schema.arguments if schema else (), node.args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.fx.Node):
            return value
    return None


def is_view(node: torch.fx.Node) -> bool:
    """Whether the result of an operation may share memory with its first argument."""
    schema = getattr(node.target, "_schema", None)
    is_alias = schema is not None and any(result.alias_info is not None for result in schema.returns)
    return is_alias or operation(node) in (*VIEWS, *UNCHANGED)


def place_of(node: torch.fx.Node) -> str:
    """Where in the module an operation is: `layer1.0.conv1 (Conv2d)`."""
    stack = list((node.meta.get("nn_module_stack") or {"": ("", nn.Module)}).values())
    path, kind = stack[-1]
    name = kind if isinstance(kind, str) else kind.__name__
    return f"{path or 'module'} ({name.rpartition('.')[2]})"
