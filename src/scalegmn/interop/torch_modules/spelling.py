"""Operations of an exported graph, spelled out as others that compute the same: einsums, stacks, sums of products."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree

from scalegmn.interop.torch_modules.channelwise import ALONG_AN_AXIS, OF_ALL, OF_TWO, POINTWISE
from scalegmn.interop.torch_modules.operators.registry import OPERATORS

aten = torch.ops.aten

Node = Any
"""A `torch.fx.Node`, whose arguments are of any type."""

_VIEWS = ("permute", "reshape", "view", "unsqueeze", "transpose", "t")


def spell_out(program: torch.export.ExportedProgram) -> None:
    """Writes operations that have no rule of their own as others that have one."""
    graph, parameters = program.graph, program.graph_signature.inputs_to_parameters
    for node in graph.nodes:
        node.meta["is_parameter"] = node.name in parameters
        _fill(node)
        node.meta["is_view"] = any(_memory(node) & _memory(source) for source in node.all_input_nodes)
    _spell_out_assignments(graph)
    rules: dict[str, Callable[[torch.fx.Graph, Node], Node | None]] = {
        "stack": _stack,
        "cdist": _distances,
        "addcmul": _sum_with_product,
        "addmv": _product_with_vector,
        "dot": _product_of_vectors,
        "pad": _pad,
        "sum": _sum_of_products,
        "einsum": _einsum,
        "baddbmm": _product_and_sum,
        "_grouped_mm": _grouped_product,
        "grouped_mm_fallback": _grouped_product,  # as transformers call it
        "linear": _low_rank,
        "matmul": _low_rank,
        "mm": _low_rank,
    }
    for node in list(graph.nodes):
        rule = rules.get(operation(node), _decomposition) if node.op == "call_function" else None
        if rule is not None and all(map(is_known_in_size, (node, *node.all_input_nodes))):
            with graph.inserting_before(node):
                result = rule(graph, node)
            if result is not None:
                node.replace_all_uses_with(result)
                graph.erase_node(node)


def operation(node: Node) -> str:
    """`conv2d` for aten.conv2d.default."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__name__", str(node.target))
    return str(node.target).split(".")[1]


def is_known_in_size(node: Node) -> bool:
    """Whether the sizes of what an operation returns are numbers, not computed from the values of tensors."""
    results = [item for item in _pytree.tree_leaves(node.meta.get("val")) if isinstance(item, torch.Tensor)]
    return all(isinstance(size, int) for item in results for size in item.shape)


def _spell_out_assignments(graph: torch.fx.Graph) -> None:
    """Writes x[..., a:b] = y as a concatenation of what is before, y, and what is behind, which all later operations
    read in place of x."""
    for node in list(graph.nodes):
        if node.op != "call_function" or operation(node) != "copy_" or not is_known_in_size(node):
            continue
        view, new = node.args[:2]
        views: list[Node] = []
        while view.op == "call_function" and operation(view) in ("slice", "select"):
            views.append(view)
            view = view.args[0]
        if not views or not _is_alone(view, node) or any(_argument(item, 4, "step", 1) != 1 for item in views):
            continue
        with graph.inserting_before(node):
            if new.meta["val"].dtype != (dtype := view.meta["val"].dtype):
                new = _inserted(graph, node, aten.to.dtype, new, dtype)
            new = _inserted(graph, node, aten.expand.default, new, [*views[0].meta["val"].shape])
            for item in views:
                new = _with_part(graph, node, item, new)
            new.meta["is_view"] = False
        later = [user for user in view.users if _is_behind(user, node)]
        for user in later:
            user.replace_input_with(view, new)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _is_alone(value: Node, change: Node) -> bool:
    """Whether a value has memory of its own, of which no view is read after a change."""
    if value.op != "call_function" or value.meta["is_view"]:
        return False
    views: list[Node] = []
    waiting = [*value.users]
    while waiting:
        user = waiting.pop()
        if user.meta["is_view"] and not _is_behind(user, change):
            views.append(user)
            waiting += user.users
    return not any(_is_behind(user, change) for view in views for user in view.users)


def _memory(node: Node) -> set[int]:
    """What holds the numbers of a node's tensors: a view has the same as its source."""
    values = [item for item in _pytree.tree_leaves(node.meta.get("val")) if isinstance(item, torch.Tensor)]
    return {item.untyped_storage()._cdata for item in values if item.layout == torch.strided}


def _is_behind(node: Node, other: Node) -> bool:
    """Whether an operation follows another one in the graph."""
    return node is not other and not node < other


def _with_part(graph: torch.fx.Graph, node: Node, view: Node, new: Node) -> Node:
    """What a view is a slice of, or selected from, with others in the view's places."""
    source, axis = view.args[0], _argument(view, 1, "dim", 0)
    size = source.meta["val"].shape[axis]
    first = _argument(view, 2, "start" if operation(view) == "slice" else "index", None) or 0
    first = min(max(first + size if first < 0 else first, 0), size)
    if operation(view) == "select":
        new = _inserted(graph, node, aten.unsqueeze.default, new, axis)
    last = first + new.meta["val"].shape[axis]
    parts = [new]
    if first:
        parts.insert(0, _inserted(graph, node, aten.slice.Tensor, source, axis, 0, first))
    if last < size:
        parts.append(_inserted(graph, node, aten.slice.Tensor, source, axis, last, size))
    return _inserted(graph, node, aten.cat.default, parts, axis)


def _decomposition(graph: torch.fx.Graph, node: Node) -> Node | None:
    """An operation that PyTorch defines by others, and that has no rule, as these; None for all other operations."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    name, target = operation(node).rstrip("_"), node.target
    is_known = name in OPERATORS or name in (*ALONG_AN_AXIS, *POINTWISE, *OF_ALL, *OF_TWO)
    if is_known or not isinstance(target, torch._ops.OpOverload) or torch.Tag.pointwise in target.tags:
        return None
    if target._schema.is_mutable or not target.has_kernel_for_dispatch_key(key):
        return None
    flat, structure = _pytree.tree_flatten((node.args, node.kwargs))
    places = [place for place, leaf in enumerate(flat) if isinstance(leaf, torch.fx.Node)]
    examples = [flat[place].meta["val"] for place in places]
    if not all(isinstance(item, torch.Tensor) for item in examples) or not isinstance(node.meta["val"], torch.Tensor):
        return None

    def decomposed(*tensors: torch.Tensor) -> Any:
        given = dict(zip(places, tensors, strict=True))
        args, kwargs = _pytree.tree_unflatten([given.get(place, leaf) for place, leaf in enumerate(flat)], structure)
        return target.decompose(*args, **kwargs)

    body = make_fx(decomposed)(*examples).graph
    inputs = [inner for inner in body.nodes if inner.op == "placeholder"]
    if any(inner.op == "get_attr" for inner in body.nodes):
        return None
    known = dict(zip(inputs, (flat[place] for place in places), strict=True))
    for inner in body.nodes:
        if inner.op == "call_function":
            args, kwargs = torch.fx.map_arg((inner.args, inner.kwargs), known.__getitem__)
            known[inner] = _inserted(graph, node, inner.target, *args, **kwargs)
        elif inner.op == "output":
            return known[inner.args[0]]
    return None


def _fill(node: Node) -> None:
    """Makes memory whose numbers are left to chance zeros."""
    filled = {
        aten.empty.memory_format: aten.zeros.default,
        aten.empty_like.default: aten.zeros_like.default,
        aten.new_empty.default: aten.new_zeros.default,
    }
    if node.target in filled:
        node.target = filled[node.target]
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "memory_format"}


def _stack(graph: torch.fx.Graph, node: Node) -> Node:
    """Values side by side along a new axis."""
    values, axis = node.args[0], _argument(node, 1, "dim", 0)
    parts = [_inserted(graph, node, aten.unsqueeze.default, value, axis) for value in values]
    return _inserted(graph, node, aten.cat.default, parts, axis)


def _distances(graph: torch.fx.Graph, node: Node) -> Node:
    """The norm of the difference of each row of one value and each row of another."""
    x, y = node.args[:2]
    rows = _inserted(graph, node, aten.unsqueeze.default, x, -2)
    columns = _inserted(graph, node, aten.unsqueeze.default, y, -3)
    difference = _inserted(graph, node, aten.sub.Tensor, rows, columns)
    return _inserted(graph, node, aten.linalg_vector_norm.default, difference, _argument(node, 2, "p", 2.0), [-1])


def _einsum(graph: torch.fx.Graph, node: Node) -> Node | None:
    """An einsum as matrix products of permuted values, two by two, or as products and sums."""
    equation, values = node.args[0].replace(" ", ""), [*node.args[1]]
    terms, _, out = equation.partition("->")
    if "->" not in equation:
        letters = terms.replace(",", "").replace("...", "")
        out = "..." * ("..." in terms) + "".join(sorted(item for item in {*letters} if letters.count(item) == 1))
    factors = terms.split(",")
    if len(values) > 2 and "..." in terms:
        return None
    while len(values) > 1:
        (x, y, *rest), (left, right, *others) = values, factors
        kept = {*out}.union(*others)
        new = out if not rest else "".join(item for item in dict.fromkeys(left + right) if item in kept)
        result = _as_product(graph, node, f"{left},{right}->{new}", x, y)
        if result is None:
            result = _as_sum(graph, node, left, right, new, x, y)
        if result is None:
            return None
        values, factors = [*rest, result] if rest else [result], [*others, new]
    return values[0] if len(node.args[1]) > 1 else None


def _as_sum(graph: torch.fx.Graph, node: Node, left: str, right: str, out: str, x: Node, y: Node) -> Node | None:
    """An einsum of two values as their product, element by element, summed over axes; None if it has diagonals."""
    if "..." in left + right + out or any(len({*part}) < len(part) for part in (left, right, out)):
        return None
    letters = out + "".join(item for item in dict.fromkeys(left + right) if item not in out)

    def aligned(value: Node, term: str) -> Node:
        order = [term.index(letter) for letter in letters if letter in term]
        if order != sorted(order):
            value = _inserted(graph, node, aten.permute.default, value, order)
        for place, letter in enumerate(letters):
            if letter not in term:
                value = _inserted(graph, node, aten.unsqueeze.default, value, place)
        return value

    product = _inserted(graph, node, aten.mul.Tensor, aligned(x, left), aligned(y, right))
    summed = [*range(len(out), len(letters))]
    return _inserted(graph, node, aten.sum.dim_IntList, product, summed) if summed else product


def _sum_of_products(graph: torch.fx.Graph, node: Node) -> Node | None:
    """(w * x).sum(axes) with a parameter w, each with an axis that the other lacks, as a matrix product."""
    product, axes = node.args[0], _argument(node, 1, "dim", None)
    is_product = isinstance(product, torch.fx.Node) and operation(product) == "mul" and len(product.users) == 1
    if not is_product or not axes or _argument(node, 2, "keepdim", False) or node.kwargs.get("dtype"):
        return None
    x, y = product.args
    if not isinstance(y, torch.fx.Node) or _is_view_of_parameter(x) == _is_view_of_parameter(y):
        return None
    if x.meta["val"].dtype != y.meta["val"].dtype:
        return None
    ndim = product.meta["val"].ndim
    summed = {axis % ndim for axis in ([axes] if isinstance(axes, int) else axes)}
    letters = [chr(ord("a") + axis) for axis in range(ndim)]
    terms, values = [], []
    with graph.inserting_before(product):
        for value in (x, y):
            shape = value.meta["val"].shape
            skipped = ndim - len(shape)
            single = [axis for axis, size in enumerate(shape) if size == 1]
            if any(product.meta["val"].shape[skipped + axis] == 1 for axis in single):
                return None
            terms.append("".join(letters[skipped + axis] for axis in range(len(shape)) if axis not in single))
            values.append(_inserted(graph, product, aten.squeeze.dims, value, single) if single else value)
        out = "".join(letters[axis] for axis in range(ndim) if axis not in summed)
        return _as_product(graph, product, f"{terms[0]},{terms[1]}->{out}", *values)


def _product_and_sum(graph: torch.fx.Graph, node: Node) -> Node:
    """beta x + alpha y z of several matrices."""
    x, y, z = node.args
    beta, alpha = (node.kwargs.get(name, 1) for name in ("beta", "alpha"))
    product = _inserted(graph, node, aten.bmm.default, y, z)
    terms = [
        value if factor == 1 else _inserted(graph, node, aten.mul.Scalar, value, factor)
        for value, factor in ((x, beta), (product, alpha))
        if beta or value is product  # PyTorch does not read x then
    ]
    return _inserted(graph, node, aten.add.Tensor, *terms) if beta else terms[0]


def _grouped_product(graph: torch.fx.Graph, node: Node) -> Node | None:
    """x_t W_e for rows t of group e, which ends before row ends_e: a sum over e of products that are 0 elsewhere."""
    x, weights, ends = (_argument(node, place, name, None) for place, name in enumerate(("self", "mat2", "offs")))
    if len(node.args) + len(node.kwargs) > 3 or ends is None:
        return None
    if x.meta["val"].ndim != 2 or weights.meta["val"].ndim != 3:
        return None
    rows = _inserted(graph, node, aten.arange.default, len(x.meta["val"]))
    rows = _inserted(graph, node, aten.unsqueeze.default, rows, -1)
    result, is_behind = None, None
    for group in range(len(weights.meta["val"])):
        end, weight = (_inserted(graph, node, aten.select.int, value, 0, group) for value in (ends, weights))
        is_in = _inserted(graph, node, aten.lt.Tensor, rows, end)
        if is_behind is not None:
            is_in = _inserted(graph, node, aten.logical_and.default, is_in, is_behind)
        is_behind = _inserted(graph, node, aten.ge.Tensor, rows, end)
        product = _inserted(graph, node, aten.mul.Tensor, _inserted(graph, node, aten.mm.default, x, weight), is_in)
        result = product if result is None else _inserted(graph, node, aten.add.Tensor, result, product)
    return result


def _sum_with_product(graph: torch.fx.Graph, node: Node) -> Node:
    """x + c y z, element by element."""
    x, y, z = node.args
    product = _inserted(graph, node, aten.mul.Tensor, y, z)
    if (factor := node.kwargs.get("value", 1)) != 1:
        product = _inserted(graph, node, aten.mul.Scalar, product, factor)
    return _inserted(graph, node, aten.add.Tensor, x, product)


def _product_with_vector(graph: torch.fx.Graph, node: Node) -> Node | None:
    """W x + b of a vector x."""
    if node.kwargs:
        return None
    bias, weight, x = node.args
    return _inserted(graph, node, aten.add.Tensor, bias, _inserted(graph, node, aten.matmul.default, weight, x))


def _product_of_vectors(graph: torch.fx.Graph, node: Node) -> Node:
    """The product of two vectors."""
    return _inserted(
        graph, node, aten.matmul.default, *node.args[::-1] if _is_view_of_parameter(node.args[0]) else node.args
    )


def _pad(graph: torch.fx.Graph, node: Node) -> Node | None:
    """Channels beside others that are all one number, such as ones."""
    x, widths = node.args[:2]
    value, mode = _argument(node, 3, "value", None), _argument(node, 2, "mode", "constant")
    if mode != "constant" or not value or len(widths) != 2 or min(widths) < 0:
        return None
    parts = [x]
    for place, width in ((0, widths[0]), (len(parts) + 1, widths[1])):
        if width:
            shape = [*x.meta["val"].shape[:-1], width]
            parts.insert(place, _inserted(graph, node, aten.new_full.default, x, shape, value))
    return _inserted(graph, node, aten.cat.default, parts, -1)


def _low_rank(graph: torch.fx.Graph, node: Node) -> Node | None:
    """A linear layer whose weight is computed from products of parameters, W + c B A, as a sum of layers in a row."""
    x, weight, *rest = node.args
    bias = rest[0] if rest else node.kwargs.get("bias")
    if not _is_low_rank(weight) or not _is_of_parameters(weight):
        return None
    result = _applied(graph, node, x, weight, operation(node) == "linear")
    return result if bias is None else _inserted(graph, node, aten.add.Tensor, result, bias)


def _is_low_rank(weight: Node) -> bool:
    """Whether a matrix is a product of two, or a sum or multiple of such."""
    if not isinstance(weight, torch.fx.Node) or weight.op != "call_function" or weight.meta["val"].ndim != 2:
        return False
    if operation(weight) in ("matmul", "mm"):
        return all(item.meta["val"].ndim == 2 for item in weight.all_input_nodes)
    is_scaled = weight.target in (aten.mul.Tensor, aten.div.Tensor) and not isinstance(weight.args[1], torch.fx.Node)
    is_sum = operation(weight) in ("add", "sub") and all(
        isinstance(item, torch.fx.Node) and item.meta["val"].shape == weight.meta["val"].shape for item in weight.args
    )
    return (is_scaled or is_sum) and any(map(_is_low_rank, weight.all_input_nodes))


def _is_of_parameters(value: Node) -> bool:
    """Whether parameters alone lead to a value."""
    sources = value.all_input_nodes
    return all(map(_is_of_parameters, sources)) if sources else bool(value.meta["is_parameter"])


def _applied(graph: torch.fx.Graph, node: Node, x: Node, weight: Node, is_linear: bool) -> Node:
    """x W^T (if `is_linear`) or x W of a matrix that is computed from products."""
    if not _is_low_rank(weight):
        return _inserted(graph, node, aten.linear.default if is_linear else aten.matmul.default, x, weight)
    if operation(weight) in ("matmul", "mm"):
        first, second = weight.args[::-1] if is_linear else weight.args
        return _applied(graph, node, _applied(graph, node, x, first, is_linear), second, is_linear)
    if operation(weight) in ("mul", "div"):
        return _inserted(
            graph, node, weight.target, _applied(graph, node, x, weight.args[0], is_linear), weight.args[1]
        )
    terms = [_applied(graph, node, x, term, is_linear) for term in weight.args]
    return _inserted(graph, node, weight.target, *terms, **weight.kwargs)


def _argument(node: Node, place: int, name: str, default: Any) -> Any:
    """An argument of an operation, given by its place or its name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _inserted(graph: torch.fx.Graph, place: Node, function: Any, *args: Any, **kwargs: Any) -> Node:
    """A new operation, at the place in the module of another one."""
    new = graph.call_function(function, args, kwargs)
    new.meta = {**place.meta, "val": function(*torch.fx.map_arg(args, lambda arg: arg.meta["val"]), **kwargs)}
    return new


def _as_product(graph: torch.fx.Graph, node: Node, equation: str, x: Node, y: Node) -> Node | None:
    """An einsum of two values as a matrix product; None if it is none, such as a trace, or an outer product."""
    ndims = [value.meta["val"].ndim for value in (x, y)]
    terms, _, out = equation.partition("->")
    left, right = terms.split(",")
    dots = {ndim - len(term) + 3 for term, ndim in zip((left, right), ndims, strict=True) if "..." in term}
    if "->" not in equation or len(dots) > 1:
        return None
    names = "".join(map(chr, range(ord("\u03b1"), ord("\u03b1") + sum(dots))))  # no letters of an equation
    left, right, out = (part.replace("...", names) for part in (left, right, out))
    shapes = {
        (*item,) for term, value in ((left, x), (right, y)) for item in zip(term, value.meta["val"].shape, strict=True)
    }
    sizes = dict(shapes)
    if len(sizes) < len(shapes) or any(len({*part}) < len(part) for part in (left, right, out)):
        return None  # broadcast, or diagonals
    if {*left} - {*right} - {*out} or {*right} - {*left} - {*out}:
        return None
    batch = [letter for letter in out if letter in left and letter in right]
    summed = [letter for letter in left if letter in right and letter not in out]
    rows, columns = ([letter for letter in out if letter in term and letter not in batch] for term in (left, right))
    if not rows or not columns or not summed:
        return None
    is_other_way = (not batch and len(columns) > 1) or out.startswith("".join(columns))
    if not batch and _is_view_of_parameter(x) != _is_view_of_parameter(y):
        is_other_way = _is_view_of_parameter(x)
    if out != "".join(batch + rows + columns) and is_other_way:
        left, right, x, y, rows, columns = right, left, y, x, columns, rows  # what a layer reads comes first

    call = partial(_inserted, graph, node)
    is_computed = not any(map(_is_view_of_argument, (x, y)))
    if batch and len(rows) > 1 and len(summed) == len(columns) == 1 and is_computed:  # heads of queries that share keys
        x = call(aten.permute.default, x, [left.index(letter) for letter in batch + rows + summed])
        y = call(aten.permute.default, y, [right.index(letter) for letter in batch + summed + columns])
        for _ in rows[1:]:
            y = call(aten.unsqueeze.default, y, len(batch))
        result, letters = call(aten.matmul.default, x, y), batch + rows + columns
        return call(aten.permute.default, result, [letters.index(letter) for letter in out])

    def arranged(value: Node, term: str, *groups: list[str]) -> Node:
        """The value with its batch first, then an axis for each group of letters (one for each letter of rows that no
        batch precedes)."""
        order = [term.index(letter) for letter in (*batch, *(letter for group in groups for letter in group))]
        if order != sorted(order):
            value = call(aten.permute.default, value, order)
        if all(len(group) == 1 or (group is rows and not batch) for group in groups):
            return value
        shape = [sizes[letter] for letter in batch]
        for group in groups:
            lengths = [sizes[letter] for letter in group]
            shape += lengths if group is rows and not batch else [math.prod(lengths)]
        return call(aten.reshape.default, value, shape)

    result = call(aten.matmul.default, arranged(x, left, rows, summed), arranged(y, right, summed, columns))
    letters = batch + rows + columns
    if result.meta["val"].ndim != len(letters):
        result = call(aten.reshape.default, result, [sizes[letter] for letter in letters])
    order = [letters.index(letter) for letter in out]
    return result if order == sorted(order) else call(aten.permute.default, result, order)


def _is_view_of_argument(node: Node) -> bool:
    """Whether a value is an argument of the graph, such as a parameter, in another shape."""
    is_view = node.op == "call_function" and operation(node) in _VIEWS
    return _is_view_of_argument(node.all_input_nodes[0]) if is_view else node.op != "call_function"


def _is_view_of_parameter(node: Node) -> bool:
    """Whether a value is a parameter, in another shape, or a part of one."""
    if node.op == "call_function" and operation(node) in (*_VIEWS, "select", "slice"):
        return _is_view_of_parameter(node.all_input_nodes[0])
    return bool(node.meta.get("is_parameter", False))
