"""One small rule per operator: how the dimensions of its inputs and outputs belong together.

A rule receives a :class:`~.tracing.Call` and returns the :class:`~.tracing.Value` of each output. It ``unify``-s
dimensions that share their indices, ``split``-s and joins them where the operator reshapes, ``freeze``-s what cannot
shrink and ``flag``-s what can shrink but not exactly: ``"statistics"`` (the values meet in a mean, a norm or a softmax),
``"scale"`` (a run-time factor such as ``1/sqrt(d)`` changes), ``"offset"`` (a masked index still contributes).
An operator that is not listed here freezes what it touches.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from .algebra import (
    Index,
    concatenation,
    cut,
    find,
    fixed,
    flag,
    freeze,
    is_fixed,
    leaves,
    name_role,
    product,
    reshape,
    split,
    unify,
    why_fixed,
)
from .provenance import TracedInt
from .scaling import BY_A_NUMBER
from .tracing import (
    FROM_NO_PARAMETER,
    LAYOUT,
    PASSIVE,
    Call,
    Contraction,
    NoRule,
    Value,
    dirty_leaves,
    overlaps,
    plain_shape,
    rule,
)

PASSIVE.update(
    """
    dtype.__get__ device.__get__ ndim.__get__ dim requires_grad.__get__ is_cuda.__get__ is_cpu.__get__ is_meta.__get__
    is_mps.__get__ is_xpu.__get__ is_xla.__get__ is_mkldnn.__get__ is_quantized.__get__ is_nested.__get__
    is_floating_point is_complex is_contiguous stride storage_offset data_ptr element_size get_device __len__
    is_sparse.__get__ layout.__get__ grad.__get__ grad_fn.__get__ is_leaf.__get__ names.__get__ itemsize.__get__
    _version.__get__ is_tensor item index is_same_size is_nonzero is_view _base.__get__ nbytes.__get__
    allclose equal is_inference is_signed hash retain_grad register_hook backward requires_grad is_grad_enabled
    is_autocast_enabled set_grad_enabled format repr str __contains__ is_conj is_neg result_type can_cast promote_types
    untyped_storage storage storage_type is_shared is_pinned is_distributed has_names dense_dim sparse_dim
    output_nr.__get__ retains_grad.__get__ grad_dtype.__get__ requires_grad.__set__ grad.__set__
    """.split()
)
LAYOUT.update(
    """
    to type float double half bfloat16 contiguous detach clone type_as cpu cuda data.__get__ view reshape view_as
    reshape_as flatten unflatten permute transpose swapaxes swapdims t T.__get__ mT.__get__ H.__get__ movedim moveaxis
    unsqueeze squeeze split split_with_sizes tensor_split chunk unbind select narrow __getitem__
    """.split()
)


def _dirty_after_product(a: Value, b: Value, shared: list[tuple[Index | None, Index | None]]) -> frozenset[Index]:
    """Dirty leaves of an elementwise product: a leaf that both operands have must be dirty in both."""
    if not a.dirty and not b.dirty:
        return frozenset()
    in_a = {leaf for x, _ in shared if x is not None for leaf in leaves(x)}
    in_b = {leaf for _, y in shared if y is not None for leaf in leaves(y)}
    dirty_a = {leaf for item in a.dirty for leaf in leaves(item)}
    dirty_b = {leaf for item in b.dirty for leaf in leaves(item)}
    return frozenset(
        {leaf for leaf in dirty_a if leaf not in in_b or leaf in dirty_b}
        | {leaf for leaf in dirty_b if leaf not in in_a or leaf in dirty_a}
    )


def _broadcast(values: list[Value], sizes: list[int]) -> tuple[list[Index], list[list[Index | None]]]:
    """Align dimensions from the right and unify those of equal size; returns output dims and aligned inputs."""
    aligned: list[list[Index | None]] = []
    for value in values:
        missing: list[Index | None] = [None] * (len(sizes) - len(value.dims))
        aligned.append(missing + list(value.dims))
    dims: list[Index] = []
    for position, size in enumerate(sizes):
        present = [row[position] for row in aligned]
        real = [dim for dim in present if dim is not None and dim.size == size]
        if size == 1 or not real:
            dims.append(fixed(size, "size 1"))
            continue
        for dim in real[1:]:
            unify(real[0], dim)
        dims.append(real[0])
    return dims, aligned


def _fresh(sizes: list[int], reason: str) -> list[Index]:
    return [fixed(size, reason) for size in sizes]


def _same(call: Call, dirty: bool = False) -> Value:
    value = call.value("input")
    return Value(list(value.dims), dirty_leaves(*value.dims) if dirty else value.dirty)


# -- elementwise --------------------------------------------------------------------------------------------------


@rule(
    "relu relu6 gelu silu swish tanh leaky_relu rrelu elu selu celu hardswish mish dropout dropout1d dropout2d dropout3d "
    "feature_dropout alpha_dropout feature_alpha_dropout abs neg negative sqrt square contiguous to type float double "
    "half bfloat16 bool int long short clone detach sin sinh asinh tan atan erf expm1 log1p round floor ceil trunc sign "
    "softsign tanhshrink softshrink hardshrink nan_to_num type_as cpu cuda identity conj real positive data.__get__",
    "input *like",
)
def keeps_zero(call: Call) -> Value:
    if call["like"] and call.name not in ("to", "type_as") and isinstance(call["like"][0], Tensor):
        raise NoRule("a tensor as its setting")
    return _same(call)


@rule(
    "sigmoid hardsigmoid exp exp2 log log2 log10 cos cosh acos rsqrt reciprocal softplus logsigmoid logit special_logit logical_not bitwise_not "
    "invert isnan isinf isfinite erfc digamma ones_like",
    "input",
)
def loses_zero(call: Call) -> Value:
    return _same(call, dirty=True)


@rule("zeros_like empty_like rand_like randn_like full_like", "input fill_value")
def like(call: Call) -> Value:
    return _same(call, dirty=call.name != "zeros_like")


@rule("clamp clip clamp_min clamp_max", "input min max")
def clamp(call: Call) -> Value:
    low, high = call["min"], call["max"]
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        raise NoRule("tensor bounds")
    if call.name == "clamp_max" and high is None:
        low, high = None, low
    return _same(call, dirty=(low is not None and low > 0) or (high is not None and high < 0))


@rule("hardtanh", "input min_val max_val")
def hardtanh(call: Call) -> Value:
    low, high = call["min_val"], call["max_val"]
    return _same(call, dirty=(low is not None and low > 0) or (high is not None and high < 0))


@rule("threshold", "input threshold value")
def threshold(call: Call) -> Value:
    return _same(call, dirty=call["threshold"] >= 0 and call["value"] != 0)


@rule("glu", "input dim")
def glu(call: Call) -> Value:
    x = call.value("input")
    dims = list(x.dims)
    position = -1 if call["dim"] is None else call["dim"]
    half = dims[position].size // 2
    first, gate = cut(dims[position], (half, half))
    unify(first, gate)
    dims[position] = first
    return Value(dims, x.dirty)


@rule("prelu", "input weight")
def prelu(call: Call) -> Value:
    x, weight = call.value("input"), call.value("weight")
    if weight.dims and weight.dims[0].size != 1:
        unify(x.dims[1 if len(x.dims) > 1 else 0], weight.dims[0])
    return Value(list(x.dims), x.dirty)


@rule(
    "add sub rsub mul multiply div divide true_divide truediv rdiv rtruediv floordiv rfloordiv floor_divide mod rmod "
    "remainder fmod pow rpow maximum minimum eq ne lt le gt ge and or xor logical_and logical_or bitwise_and bitwise_or atan2 subtract",
    "input other",
)
def binary(call: Call) -> Value:
    a, b = call["input"], call["other"]
    sizes = plain_shape(call.output)
    zero_from_both = call.name in ("add", "sub", "rsub", "subtract", "maximum", "minimum", "max", "min")
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        tensor, number = (a, b) if isinstance(a, Tensor) else (b, a)
        value = call.tracer.value(tensor)
        if isinstance(number, TracedInt) and (
            value.gain is None or call.output is tensor or call.name not in BY_A_NUMBER
        ):
            call.tracer.watcher.real.append(number)
        is_left = tensor is a
        multiplies = call.name in ("mul", "multiply") or (
            is_left and call.name in ("div", "divide", "true_divide", "truediv", "floordiv", "floor_divide")
        )
        powers = call.name == "pow" and is_left and number > 0
        harmless = multiplies or powers or (zero_from_both and number == 0)
        return Value(list(value.dims), value.dirty if harmless else dirty_leaves(*value.dims))
    left, right = call.tracer.value(a), call.tracer.value(b)
    dims, (aligned_a, aligned_b) = _broadcast([left, right], sizes)
    if call.name in ("mul", "multiply", "and", "logical_and", "bitwise_and"):
        for tensor, value, other in ((a, left, right), (b, right, left)):
            if value.stored is not None and sum(dim.size > 1 for dim in value.dims) == 1 and len(other.dims) > 1:
                call.tracer.mark_scale(tensor)
        return Value(dims, _dirty_after_product(left, right, list(zip(aligned_a, aligned_b, strict=True))))
    if call.name in ("div", "divide", "true_divide", "truediv"):
        # a quotient is zero where its numerator is, but 0 / 0 where the divisor is zero there as well
        divisor = dirty_leaves(*[y for y in aligned_b if y is not None])
        return Value(dims, left.dirty | (divisor - {leaf for item in right.dirty for leaf in leaves(item)}))
    if zero_from_both:
        return Value(dims, _dirty_after_sum(dims, [left, right]))
    return Value(dims, dirty_leaves(*dims))


def _dirty_after_sum(dims: list[Index], summands: list[Value]) -> frozenset[Index]:
    """Dirty leaves of a sum, or of a choice between: a broadcast operand is not zero at a masked index."""
    alone = [
        dim
        for place, dim in enumerate(reversed(dims), start=1)
        if dim.size > 1 and any(len(v.dims) < place or v.dims[-place].size == 1 for v in summands)
    ]
    return frozenset().union(*(value.dirty for value in summands), dirty_leaves(*alone))


@rule("outer ger", "input vec2")
def outer(call: Call) -> Value:
    a, b = call.value("input"), call.tracer.value(call["vec2"] if call["vec2"] is not None else call["other"])
    return Value([*a.dims, *b.dims], _dirty_after_product(a, b, []))


@rule("where", "condition input other")
def where(call: Call) -> Value | list[Value]:
    if call["input"] is None:  # the positions of what is not zero
        for dim in call.value("condition").dims:
            freeze(dim, "searched for positions")
        return [Value(_fresh(plain_shape(places), "positions")) for places in call.output]
    values, choices, dirty = [call.value("condition")], [], False
    for option in (call["input"], call["other"]):
        if isinstance(option, Tensor):
            choices.append(call.tracer.value(option))
        else:
            dirty = dirty or option != 0
    dims, _ = _broadcast(values + choices, plain_shape(call.output))
    return Value(dims, dirty_leaves(*dims) if dirty or not choices else _dirty_after_sum(dims, choices))


@rule("masked_fill", "input mask value")
def masked_fill(call: Call) -> Value:
    x = call.value("input")
    dims, _ = _broadcast([x, call.value("mask")], plain_shape(call.output))
    is_zero = isinstance(call["value"], (int, float)) and call["value"] == 0
    return Value(dims, _dirty_after_sum(dims, [x]) if is_zero else dirty_leaves(*dims))


@rule("masked_scatter", "input mask source")
def masked_scatter(call: Call) -> Value:
    """Whole rows are replaced by rows of the source, as where image features take the place of tokens."""
    x, mask, source = call.value("input"), call.value("mask"), call.value("source")
    with torch._C.DisableTorchFunction():
        chosen = call["mask"]
        are_rows = chosen.dim() == len(x.dims) and (chosen.size(-1) == 1 or chosen.stride(-1) == 0)
    if not are_rows or source.dims[-1].size != x.dims[-1].size:
        raise NoRule("a choice of single elements")
    for value in (x, mask, source):
        for dim in value.dims[:-1]:
            freeze(dim, "masked_scatter")
    unify(x.dims[-1], source.dims[-1])
    _broadcast([Value(x.dims), mask], plain_shape(call.output))
    return Value(list(x.dims), x.dirty | source.dirty)


@rule("lerp addcmul addcdiv", "input tensor1 tensor2")
def three_operands(call: Call) -> Value:
    tensors = [call[key] for key in ("input", "tensor1", "tensor2") if isinstance(call[key], Tensor)]
    dims, _ = _broadcast([call.tracer.value(tensor) for tensor in tensors], plain_shape(call.output))
    return Value(dims, dirty_leaves(*dims))


@rule("copy", "input other")
def copy(call: Call) -> Value:
    target, source = call.value("input"), call.value("other")
    dims, _ = _broadcast([target, source], plain_shape(call.output))
    return Value(dims, target.dirty | source.dirty | dirty_leaves(*dims))


# -- contractions -------------------------------------------------------------------------------------------------


@rule("linear", "input weight bias")
def linear(call: Call) -> Value:
    x, weight = call.value("input"), call.value("weight")
    out, summed = (weight.dims[0], weight.dims[1]) if len(weight.dims) == 2 else (None, weight.dims[0])
    unify(x.dims[-1], summed)
    call.tracer.consume(call["weight"], len(weight.dims) - 1)
    call.tracer.needs_zero(summed, x.dirty)
    dims = [*x.dims[:-1], *([out] if out is not None else [])]
    call.tracer.count(1, *dims, summed)
    dirty = _without(x.dirty, summed) | _dirty_beside(call, x.dims[:-1])
    result = Value(dims, dirty | _dirty_outputs(call, out) if out is not None else dirty)
    _note_contraction(call, weight, summed, len(weight.dims) - 1, False, result)
    return result


def _dirty_beside(call: Call, dims: list[Index]) -> frozenset[Index]:
    """Leaves beside the channels of a layer: a bias makes a row of zeros non-zero, a masked head among them."""
    return dirty_leaves(*dims) if isinstance(call["bias"], Tensor) else frozenset()


def _dirty_outputs(call: Call, out: Index) -> frozenset[Index]:
    """Dirty output indices of a layer: those of a weight or bias that is not masked itself (a sigmoid of one)."""
    dirty = call.value("weight").dirty
    if isinstance(call["bias"], Tensor):
        bias = call.value("bias")
        unify(out, bias.dims[0])
        dirty = dirty | bias.dirty
    return frozenset(overlaps(dirty, out)) if dirty else dirty


def _without(dirty: frozenset[Index], summed: Index) -> frozenset[Index]:
    if not dirty:
        return dirty
    gone = set(leaves(summed))
    return frozenset(leaf for item in dirty for leaf in leaves(item) if leaf not in gone)


def _note_contraction(call: Call, weight: Value, summed: Index, dim: int, has_padding: bool, result: Value) -> None:
    if weight.name is not None:
        call.tracer.contractions.append(
            Contraction(summed, call.tracer.module, weight.name, dim, has_padding, output=result)
        )


def _nonzero(padding: Any) -> bool:
    if isinstance(padding, str):
        return padding != "valid"
    return any(padding) if isinstance(padding, (tuple, list)) else bool(padding)


@rule("conv1d conv2d conv3d", "input weight bias stride padding dilation groups")
def convolution(call: Call) -> Value:
    x, weight = call.value("input"), call.value("weight")
    groups = call["groups"] if call["groups"] is not None else 1
    spatial = len(weight.dims) - 2
    channels = x.dims[-spatial - 1]
    out, inner = weight.dims[0], weight.dims[1]
    if int(groups) == 1:
        summed, group = inner, None
        unify(channels, inner)
    elif inner.size == 1 and out.size == channels.size:
        # depthwise: one channel per group, so the group count is the channel count
        summed, group = inner, channels
        unify(channels, out)
        call.tracer.tie(groups, channels)
    else:
        count = int(groups)
        group, summed = split(channels, (count, inner.size)) if inner.size > 1 else (channels, inner)
        if inner.size > 1:
            unify(summed, inner)
        per_group = out.size // count
        if per_group == 1:
            unify(out, group)
        else:
            out_group, out_inner = split(out, (count, per_group))
            unify(group, out_group)
            name_role(out_inner, "group_out")
        name_role(group, "groups")
        name_role(inner, "group_in")
        call.tracer.tie(groups, group)
    if group is None or inner.size > 1:
        call.tracer.consume(call["weight"], 1)
        call.tracer.needs_zero(summed, x.dirty)
    for dim in weight.dims[2:]:
        freeze(dim, "kernel size")
    for dim in x.dims[-spatial:]:
        freeze(dim, "spatial")
    sizes = plain_shape(call.output)
    kernel = prod(dim.size for dim in weight.dims[2:])
    dims = [*x.dims[: -spatial - 1], out, *_fresh(sizes[-spatial:], "spatial")]
    call.tracer.count(kernel, *dims, inner)
    # the rows of the filter are zeroed with an index, so the output is zero there whatever a grouped filter reads
    dirty = _dirty_outputs(call, out) | _without(x.dirty, channels) | _dirty_beside(call, x.dims[: -spatial - 1])
    result = Value(dims, dirty)
    if group is None or inner.size > 1:
        padding = _nonzero(call["padding"]) and kernel > 1
        _note_contraction(call, weight, summed, 1, padding, result)
    return result


@rule(
    "conv_transpose1d conv_transpose2d conv_transpose3d",
    "input weight bias stride padding output_padding groups dilation",
)
def transposed_convolution(call: Call) -> Value:
    x, weight = call.value("input"), call.value("weight")
    count = int(call["groups"] or 1)
    spatial = len(weight.dims) - 2
    channels, per_group = x.dims[-spatial - 1], weight.dims[1]
    unify(channels, weight.dims[0])
    call.tracer.needs_zero(channels, x.dirty)
    if count == 1:
        call.tracer.consume(call["weight"], 0)
        out = per_group
    else:
        inner = channels.size // count
        group = split(channels, (count, inner))[0] if inner > 1 else channels
        out = product([group, per_group])
        name_role(group, "groups")
        call.tracer.tie(call["groups"], group)
    for dim in weight.dims[2:]:
        freeze(dim, "kernel size")
    for dim in x.dims[-spatial:]:
        freeze(dim, "spatial")
    sizes = plain_shape(call.output)
    # every input position meets every kernel position once
    kernel = prod(dim.size for dim in weight.dims[2:])
    call.tracer.count(kernel, *x.dims, per_group)
    dims = [*x.dims[: -spatial - 1], out, *_fresh(sizes[-spatial:], "spatial")]
    dirty = _dirty_outputs(call, out) | _without(x.dirty, channels) | _dirty_beside(call, x.dims[: -spatial - 1])
    return Value(dims, dirty)


@rule("matmul bmm mm mv", "input other")
def matmul(call: Call) -> Value:
    return _matmul(call, call["input"], call["other"])


@rule("addmm baddbmm addbmm", "input mat1 mat2")
def add_matmul(call: Call) -> Value:
    first = call["mat1"] if call["mat1"] is not None else call["batch1"]
    second = call["mat2"] if call["mat2"] is not None else call["batch2"]
    result = _matmul(call, first, second)
    added = call.value("input")
    dims, _ = _broadcast([result, added], plain_shape(call.output))
    return Value(dims, _dirty_after_sum(dims, [result, added]))


def _matmul(call: Call, first: Tensor, second: Tensor) -> Value:
    a, b = call.tracer.value(first), call.tracer.value(second)
    if len(a.dims) < 2:
        raise NoRule("a vector times a matrix")
    if len(b.dims) < 2:
        return _times_vector(call, first, second)
    unify(a.dims[-1], b.dims[-2])
    if b.stored is None:
        call.tracer.consume(first, len(a.dims) - 1)
    call.tracer.consume(second, len(b.dims) - 2)  # of two parameters the second reads what the first makes
    sizes = plain_shape(call.output)
    batch, aligned = _broadcast([Value(a.dims[:-2]), Value(b.dims[:-2])], sizes[:-2])
    # a learned matrix is not masked along the dimension that is summed over, an activation is
    operands = [value.dirty for value in (a, b) if value.stored is None]
    call.tracer.needs_zero(a.dims[-1], *(operands or [a.dirty]))
    dims = [*batch, a.dims[-2], b.dims[-1]]
    call.tracer.count(4 if call.output.is_complex() else 1, *dims, a.dims[-1])  # real multiply-accumulates
    if len(batch) > 1 and a.stored is None and b.stored is None:  # query @ key, or weights @ value
        name_role(batch[-1], "heads")
        name_role(a.dims[-1], "head_dim")
        name_role(b.dims[-1], "value_dim")
    shared = list(zip(aligned[0], aligned[1], strict=True))
    kept_a = Value([], _without(a.dirty, a.dims[-1]))
    kept_b = Value([], _without(b.dirty, b.dims[-2]))
    return Value(dims, _dirty_after_product(kept_a, kept_b, shared))


def _explicit(equation: str, ranks: list[int]) -> tuple[str, str]:
    """The two sides of an einsum equation, with a letter for each dimension: none implied, no ellipsis."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    if not arrow:
        plain = left.replace(".", "").replace(",", "")
        right = "..." * ("..." in left) + "".join(letter for letter in sorted(set(plain)) if plain.count(letter) == 1)
    terms = left.split(",")
    covered = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    unused = [chr(code) for code in range(0x3B1, 0x3B1 + max(covered, default=0))]  # Greek: no equation holds them
    terms = [
        term.replace("...", "".join(unused[len(unused) - count :])) for term, count in zip(terms, covered, strict=True)
    ]
    return ",".join(terms), right.replace("...", "".join(unused))


def _times_vector(call: Call, first: Tensor, second: Tensor) -> Value:
    """A matrix times a vector sums over the vector's only dimension."""
    a, b = call.tracer.value(first), call.tracer.value(second)
    summed = a.dims[-1]
    unify(summed, b.dims[-1])
    if b.stored is None:
        call.tracer.consume(first, len(a.dims) - 1)
    call.tracer.consume(second, 0)
    operands = [value.dirty for value in (a, b) if value.stored is None]
    call.tracer.needs_zero(summed, *(operands or [a.dirty]))
    call.tracer.count(1, *a.dims)
    return Value(list(a.dims[:-1]), _without(a.dirty, summed))


@rule("einsum", "equation *operands")
def einsum(call: Call) -> Value:
    operands = [call.tracer.value(tensor) for tensor in call["operands"]]
    left, right = _explicit(call["equation"], [len(value.dims) for value in operands])
    letters: dict[str, Index] = {}
    for term, value in zip(left.split(","), operands, strict=True):
        for letter, dim in zip(term, value.dims, strict=True):
            if letter not in letters or letters[letter].size == 1:
                letters[letter] = dim
            elif dim.size != 1:
                unify(letters[letter], dim)
    for letter in set("".join(left.split(","))) - set(right):
        holders = [value for term, value in zip(left.split(","), operands, strict=True) if letter in term]
        acting = [value.dirty for value in holders if value.stored is None]
        for tensor, term, value in zip(call["operands"], left.split(","), operands, strict=True):
            if letter in term and (acting or value is not holders[0]):
                call.tracer.consume(tensor, term.index(letter))
        call.tracer.needs_zero(letters[letter], *(acting or [holders[0].dirty]))
    if len(operands) == 2:
        call.tracer.count(1, *letters.values())
    terms = left.split(",")
    if len(operands) == 2 and all(value.stored is None for value in operands):  # attention, as in _matmul
        both = [letter for letter in right if letter in terms[0] and letter in terms[1]]
        if len(both) > 1:
            name_role(letters[both[-1]], "heads")
            for letter in terms[1]:
                if letter not in both:
                    name_role(letters[letter], "value_dim" if letter in right else "head_dim")
    # a product is zero at a masked index where one of the factors that have it is
    dirty: set[Index] = set()
    for letter in right if any(value.dirty for value in operands) else "":
        size = letters[letter].size  # an operand of size 1 is broadcast
        pairs = [(term, value) for term, value in zip(terms, operands, strict=True) if letter in term]
        holders = [value for term, value in pairs if value.dims[term.index(letter)].size == size]
        dirty |= set.intersection(*(overlaps(value.dirty, letters[letter]) for value in holders))
    return Value([letters[letter] for letter in right], frozenset(dirty))


@rule("scaled_dot_product_attention", "query key value attn_mask dropout_p is_causal scale")
def attention(call: Call) -> Value:
    query, key, value = (call.value(name) for name in ("query", "key", "value"))
    sizes = plain_shape(call.output)
    if call["enable_gqa"] and query.dims[-3].size != key.dims[-3].size:
        # every head of keys and values serves as many neighbouring heads of queries
        per_head, groups = query.dims[-3], key.dims[-3].size
        shared, repeats = split(per_head, (groups, per_head.size // groups))
        unify(key.dims[-3], value.dims[-3])
        unify(shared, key.dims[-3])
        name_role(shared, "heads")
        key, value = (
            Value([*part.dims[:-3], per_head, *part.dims[-2:]], part.dirty | dirty_leaves(repeats), gain=part.gain)
            for part in (key, value)
        )
    batch, _ = _broadcast([Value(part.dims[:-2]) for part in (query, key, value)], sizes[:-2])
    unify(query.dims[-1], key.dims[-1])
    unify(key.dims[-2], value.dims[-2])
    flag(key.dims[-2], "statistics")
    width = query.dims[-1]
    factor = ((TracedInt(width.size, width, call.tracer.watcher), -0.5),) if call["scale"] is None else None
    mask = call.value("attn_mask").gain if isinstance(call["attn_mask"], Tensor) else None
    call.tracer.gains.attend(query.gain, key.gain, value.gain, mask, factor=factor, scale=call["scale"])
    call.tracer.needs_zero(query.dims[-1], query.dirty, key.dirty)
    if batch:
        name_role(batch[-1], "heads")
    name_role(query.dims[-1], "head_dim")
    name_role(value.dims[-1], "value_dim")  # as in _matmul, so that no name depends on the attention implementation
    if isinstance(call["attn_mask"], Tensor):
        scores = [*batch, query.dims[-2], key.dims[-2]]
        _broadcast([Value(scores), call.value("attn_mask")], [dim.size for dim in scores])
    call.tracer.count(1, *batch, query.dims[-2], key.dims[-2], query.dims[-1])
    call.tracer.count(1, *batch, query.dims[-2], key.dims[-2], value.dims[-1])
    # softmax leaves no zeros: the output is zero at a masked index only where the values are
    own = [
        dim for place, dim in enumerate(reversed(batch), 3) if len(value.dims) < place or value.dims[-place].size == 1
    ]
    dirty = value.dirty | dirty_leaves(query.dims[-2], *own)
    return Value([*batch, query.dims[-2], value.dims[-1]], dirty)


@rule(
    "multi_head_attention_forward",
    "query key value embed_dim_to_check num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn dropout_p "
    "out_proj_weight out_proj_bias training key_padding_mask need_weights attn_mask use_separate_proj_weight "
    "q_proj_weight k_proj_weight v_proj_weight static_k static_v average_attn_weights is_causal",
)
def packed_attention(call: Call) -> list[Value]:
    """``nn.MultiheadAttention``: it wants heads x head_dim to be as many as its input has, so these are one here."""
    if any(isinstance(call[key], Tensor) for key in ("bias_k", "bias_v", "static_k", "static_v")):
        raise NoRule("further keys and values")
    inputs = [call.value(key) for key in ("query", "key", "value")]
    query, key, value = inputs
    width, count = query.dims[-1], int(call["num_heads"])
    heads, head_dim = split(width, (count, width.size // count))
    name_role(heads, "heads")
    name_role(head_dim, "head_dim")
    call.tracer.tie(call["num_heads"], heads)
    call.tracer.tie(call["embed_dim_to_check"], width)
    separate = [call[name] for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight")]
    if isinstance(call["in_proj_weight"], Tensor):
        packed = call.value("in_proj_weight")
        projections = [(part, packed.dims[1]) for part in cut(packed.dims[0], (width.size,) * 3)]
        call.tracer.consume(call["in_proj_weight"], 1)
    else:
        projections = [(call.tracer.value(weight).dims[0], call.tracer.value(weight).dims[1]) for weight in separate]
        for weight in separate:
            call.tracer.consume(weight, 1)
    for (out, summed), x in zip(projections, inputs, strict=True):
        unify(out, width)
        unify(x.dims[-1], summed)
        call.tracer.needs_zero(summed, x.dirty)
        call.tracer.count(1, *x.dims[:-1], out, summed)
    if isinstance(call["in_proj_bias"], Tensor):
        for part in cut(call.value("in_proj_bias").dims[0], (width.size,) * 3):
            unify(part, width)
    weight = call.value("out_proj_weight")
    unify(weight.dims[1], width)
    call.tracer.consume(call["out_proj_weight"], 1)
    if isinstance(call["out_proj_bias"], Tensor):
        unify(call.value("out_proj_bias").dims[0], weight.dims[0])
    for name in ("attn_mask", "key_padding_mask"):
        if isinstance(call[name], Tensor) and len(call.value(name).dims) == 3:
            freeze(heads, "heads in an attention mask")
    for a, b in zip(key.dims[:-1], value.dims[:-1], strict=True):
        unify(a, b)
    for a, b in zip(query.dims[1:-1], key.dims[1:-1], strict=True):  # the batch
        unify(a, b)
    flag(key.dims[0], "statistics")
    flag(head_dim, "scale")
    scores = [*query.dims[1:-1], heads, query.dims[0], key.dims[0]]
    call.tracer.count(2, *scores, head_dim)
    call.tracer.count(1, *query.dims[:-1], weight.dims[0], width)
    shown = [dim for dim in scores if dim is not heads] if call["average_attn_weights"] in (None, True) else scores
    return [Value([*query.dims[:-1], weight.dims[0]]), Value(shown, dirty_leaves(*shown))]


# -- normalisation ------------------------------------------------------------------------------------------------


def _affine(call: Call, channels: list[Index]) -> bool:
    """Unify weight and bias with the channels. True when both zero the output at a masked index."""
    masked = isinstance(call["weight"], Tensor)
    for key in ("weight", "bias"):
        if isinstance(call[key], Tensor):
            value = call.value(key)
            masked = masked and not value.dirty
            for dim, channel in zip(value.dims, channels, strict=True):
                unify(channel, dim)
    return masked


@rule("batch_norm", "input running_mean running_var weight bias training momentum eps")
def batch_norm(call: Call) -> Value:
    x = call.value("input")
    channel = x.dims[1]
    for key in ("running_mean", "running_var"):
        if isinstance(call[key], Tensor):
            unify(channel, call.value(key).dims[0])
            call.tracer.consume(call[key], 0)  # statistics are no producers: a masked input is not masked behind them
    masked = _affine(call, [channel])
    call.tracer.mark_scale(call["weight"])
    beside = [dim for position, dim in enumerate(x.dims) if position != 1]
    if call["training"]:  # weight standardisation: every dimension but the channel meets in the statistics
        for dim in beside:
            flag(dim, "statistics")
        # what is zero has a mean of zero, so without a shift it stays zero
        kept = x.dirty if masked or call["bias"] is None else dirty_leaves(*x.dims)
        return Value(list(x.dims), kept | _dirty_beside(call, beside))
    dirty = _without(x.dirty, channel) | dirty_leaves(*beside)  # the running mean is a bias as well
    return Value(list(x.dims), dirty if masked else dirty_leaves(*x.dims))


@rule("layer_norm rms_norm", "input normalized_shape weight bias eps")
def layer_norm(call: Call) -> Value:
    x = call.value("input")
    shape = call["normalized_shape"]
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    normalised = x.dims[len(x.dims) - len(shape) :]
    for size, dim in zip(shape, normalised, strict=True):
        flag(dim, "statistics")
        if isinstance(size, TracedInt):
            call.tracer.tie(size, dim)
    masked = _affine(call, normalised)
    dirty = x.dirty | _dirty_beside(call, x.dims[: len(x.dims) - len(shape)])
    return Value(list(x.dims), dirty if masked else dirty | dirty_leaves(*normalised))


@rule("group_norm", "input num_groups weight bias eps")
def group_norm(call: Call) -> Value:
    x, count = call.value("input"), int(call["num_groups"])
    channel = x.dims[1]
    masked = _affine(call, [channel])
    if count == channel.size:
        call.tracer.tie(call["num_groups"], channel)
    elif count == 1:
        flag(channel, "statistics")
    else:
        group, inner = split(channel, (count, channel.size // count))
        flag(inner, "statistics")
        name_role(group, "groups")
        name_role(inner, "group_channels")
        call.tracer.tie(call["num_groups"], group)
    dirty = x.dirty | _dirty_beside(call, [dim for dim in x.dims if dim is not channel])
    return Value(list(x.dims), dirty if masked else dirty | dirty_leaves(channel))


@rule("weight_norm", "v g dim")
def weight_norm(call: Call) -> Value:
    """``g * v / ||v||`` for each index of ``dim``; ``g`` makes the values, for a direction without a length is none."""
    v, g = call.value("v"), call.value("g")
    position = (0 if call["dim"] is None else call["dim"]) % len(v.dims)
    for place, dim in enumerate(v.dims):
        if place == position:
            unify(g.dims[place], dim)
            call.tracer.consume(call["v"], place)
        else:
            flag(dim, "statistics")
    return Value(list(v.dims), g.dirty)


@rule("instance_norm", "input running_mean running_var weight bias use_input_stats momentum eps")
def instance_norm(call: Call) -> Value:
    if isinstance(call["running_mean"], Tensor):
        return batch_norm(call)
    x = call.value("input")
    masked = _affine(call, [x.dims[1]])
    dirty = x.dirty | _dirty_beside(call, [x.dims[0], *x.dims[2:]])
    return Value(list(x.dims), dirty if masked or call["weight"] is None else dirty | dirty_leaves(x.dims[1]))


@rule("softmax log_softmax softmin", "input dim")
def softmax(call: Call) -> Value:
    x = call.value("input")
    if call["dim"] is None:
        raise NoRule("no dim given")
    flag(x.dims[call["dim"]], "statistics")
    return Value(list(x.dims), dirty_leaves(*x.dims))


@rule("normalize", "input p dim eps")
def normalize(call: Call) -> Value:
    x = call.value("input")
    flag(x.dims[1 if call["dim"] is None else call["dim"]], "statistics")
    return Value(list(x.dims), x.dirty)


# -- reductions ---------------------------------------------------------------------------------------------------


@rule("max min", "input other keepdim")
def max_or_min(call: Call) -> Value | list[Value]:
    if isinstance(call["other"], Tensor):
        return binary(call)
    if call["other"] is not None:
        call.args["dim"] = call["other"]
    return reduce(call)


@rule("norm linalg_vector_norm linalg_norm", "input p dim keepdim")
@rule("var std var_mean std_mean", "input dim unbiased keepdim")
@rule("mean sum amax amin prod any all argmax argmin logsumexp", "input dim keepdim")
def reduce(call: Call) -> Value | list[Value]:
    x = call.value("input")
    which = call["dim"]
    if isinstance(which, str):
        raise NoRule("named dimensions")
    if isinstance(which, bool):  # var(False): the first argument is not the dimension
        which = None
    if which is None or (isinstance(which, (tuple, list)) and not which):
        which = range(len(x.dims))
    gone = {int(d) % len(x.dims) for d in ([which] if isinstance(which, int) else which)}
    for position in gone:
        dim = x.dims[position]
        if is_fixed(dim):
            continue
        if call.name == "sum":
            call.tracer.needs_zero(dim, x.dirty)
        else:
            flag(dim, "statistics")
    keep = bool(call["keepdim"])
    dims = [
        fixed(1, "size 1") if position in gone else dim
        for position, dim in enumerate(x.dims)
        if keep or position not in gone
    ]
    # the mean or sum of zeros is zero; the largest of values some of which are zero is not known
    dirty = frozenset(leaf for dim in dims for leaf in leaves(dim)) & {
        leaf for item in x.dirty for leaf in leaves(item)
    }
    if call.name in ("prod", "any", "all", "argmax", "argmin", "logsumexp"):
        dirty = dirty_leaves(*dims)
    result = Value(dims, frozenset(dirty))
    if isinstance(call.output, Tensor):
        return result
    return [result, Value(list(dims), result.dirty if call.name.endswith("_mean") else dirty_leaves(*dims))]


# -- spatial ------------------------------------------------------------------------------------------------------


@rule(
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d interpolate upsample lp_pool2d "
    "max_pool2d_with_indices adaptive_max_pool2d_with_indices grid_sample",
    "input grid",
)
def spatial(call: Call) -> Value | list[Value]:
    x = call.value("input")
    one = call.output if isinstance(call.output, Tensor) else call.output[0]
    sizes = plain_shape(one)
    lead = 1 if len(x.dims) == 3 and call.name.endswith(("2d", "2d_with_indices")) else 2
    if isinstance(call["grid"], Tensor):
        grid = call.value("grid")
        unify(x.dims[0], grid.dims[0])  # deformable attention folds its heads into the batch
        for dim in grid.dims[1:]:
            freeze(dim, "sampling grid")
        if not is_fixed(x.dims[0]):
            name_role(x.dims[0], "heads")
            name_role(x.dims[1], "value_dim")
    for dim in x.dims[lead:]:
        freeze(dim, "spatial")
    dims = [*x.dims[:lead], *_fresh(sizes[lead:], "spatial")]
    result = Value(dims, x.dirty)
    return result if isinstance(call.output, Tensor) else [result, Value(list(dims), dirty_leaves(*dims))]


@rule("pad", "input pad mode value")
def pad(call: Call) -> Value:
    x = call.value("input")
    amounts = list(call["pad"])
    dims = list(x.dims)
    dirty = x.dirty
    for step in range(len(amounts) // 2):
        before, after = int(amounts[2 * step]), int(amounts[2 * step + 1])
        position = len(dims) - 1 - step
        for amount in amounts[2 * step : 2 * step + 2]:
            call.tracer.tie(amount, fixed(amount, "padding"))
        if before == 0 and after == 0:
            continue
        if before < 0 or after < 0 or (call["mode"] or "constant") != "constant":
            freeze(dims[position], "padding")
            dims[position] = fixed(plain_shape(call.output)[position], "padding")
        elif is_fixed(dims[position]):
            dims[position] = fixed(dims[position].size + before + after, "padding")
        else:
            ends = [fixed(before, "padding"), dims[position], fixed(after, "padding")]
            dims[position] = concatenation(ends)
    if call["value"]:
        dirty = dirty | dirty_leaves(*dims)
    return Value(dims, dirty)


@rule("pixel_shuffle", "input upscale_factor")
def pixel_shuffle(call: Call) -> Value:
    x, factor = call.value("input"), int(call["upscale_factor"])
    call.tracer.tie(call["upscale_factor"], fixed(factor, "pixel shuffle"))
    channel, *kernel = split(x.dims[-3], (x.dims[-3].size // factor**2, factor, factor))
    for part in kernel:
        freeze(part, "pixel shuffle")
    for dim in x.dims[-2:]:
        freeze(dim, "spatial")
    sizes = plain_shape(call.output)
    return Value([*x.dims[:-3], channel, *_fresh(sizes[-2:], "spatial")], x.dirty)


@rule("pixel_unshuffle", "input downscale_factor")
def pixel_unshuffle(call: Call) -> Value:
    x, factor = call.value("input"), int(call["downscale_factor"])
    for dim in x.dims[-2:]:
        freeze(dim, "spatial")
    sizes = plain_shape(call.output)
    call.tracer.tie(call["downscale_factor"], fixed(factor, "pixel shuffle"))
    channel = product([x.dims[-3], fixed(factor, "pixel shuffle"), fixed(factor, "pixel shuffle")])
    return Value([*x.dims[:-3], channel, *_fresh(sizes[-2:], "spatial")], x.dirty)


@rule("unfold", "input kernel_size dilation padding stride")
def unfold(call: Call) -> Value:
    x = call.value("input")
    if len(plain_shape(call.output)) == len(x.dims) + 1:  # the method: windows along one dimension
        position, size, step = (call[key] for key in ("kernel_size", "dilation", "padding"))
        if not all(isinstance(number, int) for number in (position, size, step)):
            raise NoRule("windows by keyword")
        freeze(x.dims[position], "sliding windows")
        sizes, dims = plain_shape(call.output), list(x.dims)
        dims[position] = fixed(sizes[position], "sliding windows")
        return Value([*dims, fixed(sizes[-1], "window size")], x.dirty)
    if len(x.dims) != 4:
        raise NoRule("windows of a single image")
    sizes = plain_shape(call.output)
    kernel = sizes[1] // x.dims[1].size
    for dim in x.dims[2:]:
        freeze(dim, "spatial")
    return Value([x.dims[0], product([x.dims[1], fixed(kernel, "kernel size")]), fixed(sizes[2], "spatial")], x.dirty)


@rule("fold", "input output_size kernel_size dilation padding stride")
def fold(call: Call) -> Value:
    x, sizes = call.value("input"), plain_shape(call.output)
    if len(x.dims) != 3:
        raise NoRule("one example without a batch")
    channel, kernel = x.dims[1], x.dims[1].size // sizes[1]
    if kernel > 1:
        channel, kernel_part = split(channel, (sizes[1], kernel))
        freeze(kernel_part, "kernel size")
    return Value([x.dims[0], channel, *_fresh(sizes[2:], "spatial")], x.dirty)


# -- layout -------------------------------------------------------------------------------------------------------


def _reshaped(call: Call, sizes: tuple[Any, ...], x: Value) -> Value:
    actual = plain_shape(call.output)
    dims = reshape(x.dims, actual)
    for size, dim in zip(sizes, dims, strict=True):
        call.tracer.tie(size, dim)
    return Value(dims, x.dirty)


@rule("view reshape", "input *shape")
def view(call: Call) -> Value:
    if call["dtype"] is not None or any(isinstance(size, torch.dtype) for size in call["shape"]):
        raise NoRule("a view as another type")
    return _reshaped(call, call["shape"], call.value("input"))


@rule("view_as reshape_as", "input other")
def view_as(call: Call) -> Value:
    x, other = call.value("input"), call.value("other")
    dims = reshape(x.dims, plain_shape(call.output))
    for a, b in zip(dims, other.dims, strict=True):
        unify(a, b)
    return Value(dims, x.dirty)


@rule("flatten", "input start_dim end_dim")
def flatten(call: Call) -> Value:
    x = call.value("input")
    return Value(reshape(x.dims, plain_shape(call.output)), x.dirty)


@rule("unflatten", "input dim sizes")
def unflatten(call: Call) -> Value:
    x = call.value("input")
    position = call["dim"] % len(x.dims)
    sizes = tuple(call["sizes"])
    ints = (-1,) * position + sizes + (-1,) * (len(x.dims) - position - 1)
    return _reshaped(call, ints, x)


@rule("permute", "input *dims")
def permute(call: Call) -> Value:
    x = call.value("input")
    return Value([x.dims[d] for d in call["dims"]], x.dirty)


@rule("transpose swapaxes swapdims", "input dim0 dim1")
def transpose(call: Call) -> Value:
    x = call.value("input")
    dims = list(x.dims)
    dims[call["dim0"]], dims[call["dim1"]] = dims[call["dim1"]], dims[call["dim0"]]
    return Value(dims, x.dirty)


@rule("t T.__get__ mT.__get__ H.__get__", "input")
def transpose_last(call: Call) -> Value:
    x = call.value("input")
    if len(x.dims) > 2 and call.name == "T.__get__":
        return Value(list(reversed(x.dims)), x.dirty)
    dims = [*x.dims[:-2], *reversed(x.dims[-2:])]
    return Value(dims, x.dirty)


@rule("movedim moveaxis", "input source destination")
def movedim(call: Call) -> Value:
    x = call.value("input")
    source, destination = call["source"], call["destination"]
    if not isinstance(source, int):
        raise NoRule("several dimensions at once")
    dims = list(x.dims)
    dim = dims.pop(source)
    dims.insert(destination % len(x.dims), dim)
    return Value(dims, x.dirty)


@rule("unsqueeze", "input dim")
def unsqueeze(call: Call) -> Value:
    x = call.value("input")
    dims = list(x.dims)
    dims.insert(call["dim"] % (len(dims) + 1), fixed(1, "size 1"))
    return Value(dims, x.dirty)


@rule("squeeze", "input dim")
def squeeze(call: Call) -> Value:
    x = call.value("input")
    which = call["dim"]
    chosen = range(len(x.dims)) if which is None else [which] if isinstance(which, int) else which
    gone = {d % len(x.dims) for d in chosen if x.dims[d].size == 1}
    return Value([dim for position, dim in enumerate(x.dims) if position not in gone], x.dirty)


@rule("expand", "input *size")
def expand(call: Call) -> Value:
    x = call.value("input")
    return _expanded(call, x, list(call["size"]))


def _expanded(call: Call, x: Value, sizes: list[Any]) -> Value:
    actual = plain_shape(call.output)
    padded: list[Index | None] = [None] * (len(actual) - len(x.dims))
    dims: list[Index] = []
    copied: list[Index] = []
    for asked, size, dim in zip(sizes, actual, padded + list(x.dims), strict=True):
        if dim is None or dim.size != size:
            dim = Index(size)
            copied.append(dim)
            if not isinstance(asked, TracedInt):
                freeze(dim, "expanded to a constant")
        call.tracer.tie(asked, dim)
        dims.append(dim)
    return Value(dims, x.dirty | dirty_leaves(*copied))


@rule("expand_as", "input other")
def expand_as(call: Call) -> Value:
    return _expanded(call, call.value("input"), list(call.tracer.shape(call["other"])))


@rule("broadcast_to", "input size")
def broadcast_to(call: Call) -> Value:
    return _expanded(call, call.value("input"), list(call["size"]))


@rule("repeat tile", "input *repeats")
def repeat(call: Call) -> Value:
    x = call.value("input")
    asked = [1] * (len(x.dims) - len(call["repeats"])) + list(call["repeats"])  # tile may name the last dimensions only
    padded = [fixed(1, "size 1")] * (len(asked) - len(x.dims)) + list(x.dims)
    dims: list[Index] = []
    copied: list[Index] = []
    for times, dim in zip(asked, padded, strict=True):
        if dim.size == 1 and isinstance(times, TracedInt):  # an expansion to the size of something else
            dim = Index(times)
            copied.append(dim)
            call.tracer.tie(times, dim)
        else:
            call.tracer.tie(times, fixed(times, "repeats"))
            dim = product([fixed(times, "repeats"), dim]) if times != 1 else dim
        dims.append(dim)
    return Value(dims, x.dirty | dirty_leaves(*copied))


@rule("repeat_interleave", "input repeats dim")
def repeat_interleave(call: Call) -> Value:
    x = call.value("input")
    if not isinstance(call["repeats"], int) or call["dim"] is None:
        raise NoRule("repeats that differ")
    dims = list(x.dims)
    call.tracer.tie(call["repeats"], fixed(call["repeats"], "repeats"))
    dims[call["dim"]] = product([dims[call["dim"]], fixed(call["repeats"], "repeats")])
    return Value(dims, x.dirty)


@rule("cat concat concatenate", "tensors dim")
def cat(call: Call) -> Value:
    values = [call.tracer.value(tensor) for tensor in call["tensors"]]
    values = [value for value in values if prod(dim.size for dim in value.dims)]
    rank = len(values[0].dims)
    position = (call["dim"] or 0) % rank
    dims: list[Index] = []
    for place in range(rank):
        column = [value.dims[place] for value in values]
        if place == position:
            dims.append(concatenation(column))
            continue
        for other in column[1:]:
            unify(column[0], other)
        dims.append(column[0])
    return Value(dims, frozenset().union(*(value.dirty for value in values)))


@rule("stack", "tensors dim")
def stack(call: Call) -> Value:
    values = [call.tracer.value(tensor) for tensor in call["tensors"]]
    dims = list(values[0].dims)
    for value in values[1:]:
        for a, b in zip(dims, value.dims, strict=True):
            unify(a, b)
    position = (call["dim"] or 0) % (len(dims) + 1)
    dims.insert(position, fixed(len(values), "number of stacked tensors"))
    return Value(dims, frozenset().union(*(value.dirty for value in values)))


@rule("split split_with_sizes tensor_split", "input split_size dim")
def split_rule(call: Call) -> list[Value]:
    sections = call["split_size"] if call["split_size"] is not None else call["split_size_or_sections"]
    sections = call["split_sizes"] if sections is None else sections
    if call.name == "tensor_split" and not isinstance(sections, int):
        raise NoRule("tensor_split at positions")
    return _pieces(call, list(sections) if isinstance(sections, (tuple, list)) else None, sections)


@rule("chunk", "input chunks dim")
def chunk(call: Call) -> list[Value]:
    return _pieces(call, None, None)


def _pieces(call: Call, sections: list[Any] | None, step: Any) -> list[Value]:
    x = call.value("input")
    position = (call["dim"] or 0) % len(x.dims)
    sizes = [plain_shape(piece)[position] for piece in call.output]
    dim = x.dims[position]
    if is_fixed(dim):
        parts = _fresh(sizes, why_fixed(dim))
    else:
        parts = cut(dim, sizes)
        if sections is not None:
            for size, part in zip(sections, parts, strict=True):
                call.tracer.tie(size, part)
        else:
            # equal pieces must stay equal
            for part in parts[1:]:
                if part.size == parts[0].size:
                    unify(parts[0], part)
                else:
                    freeze(part, "unequal pieces")
                    freeze(parts[0], "unequal pieces")
            if call.name.startswith("split") and step is not None:
                call.tracer.tie(step, parts[0])
    result = []
    for part in parts:
        dims = list(x.dims)
        dims[position] = part
        result.append(Value(dims, x.dirty))
    return result


@rule("unbind", "input dim")
def unbind(call: Call) -> list[Value]:
    x = call.value("input")
    position = (call["dim"] or 0) % len(x.dims)
    freeze(x.dims[position], "unbound")
    dims = [dim for place, dim in enumerate(x.dims) if place != position]
    return [Value(list(dims), x.dirty) for _ in call.output]


@rule("__iter__ iter", "input")
def iterate(call: Call) -> Any:
    raise NoRule("iteration over a tensor")


@rule("select", "input dim index")
def select(call: Call) -> Value:
    x = call.value("input")
    position = call["dim"] % len(x.dims)
    freeze(x.dims[position], "selected by position")
    return Value([dim for place, dim in enumerate(x.dims) if place != position], x.dirty)


@rule("narrow", "input dim start length")
def narrow(call: Call) -> Value:
    x = call.value("input")
    position, start = call["dim"] % len(x.dims), call["start"]
    dims = list(x.dims)
    dims[position] = _segment(call, dims[position], start, start + call["length"])
    return Value(dims, x.dirty)


def _segment(call: Call, dim: Index, start: Any, stop: Any) -> Index:
    """The part [start, stop) of a dimension; the bounds are tied to what they measure."""
    size = dim.size
    first = 0 if start is None else int(start) + (size if int(start) < 0 else 0)
    last = size if stop is None else min(size, int(stop) + (size if int(stop) < 0 else 0))
    first, last = max(0, min(first, size)), max(0, last)
    if first == 0 and last == size:
        if isinstance(stop, TracedInt) and int(stop) == size:
            call.tracer.tie(stop, dim)
        return dim
    if is_fixed(dim):
        return fixed(max(0, last - first), why_fixed(dim))
    if last <= first:
        freeze(dim, "an empty slice")
        return fixed(0, "empty")
    before, piece, after = cut(dim, (first, last - first, size - last))
    for bound, place, extent in ((start, first, [before]), (stop, last, [before, piece])):
        if bound is None:
            continue
        measured = concatenation([part for part in extent if part.size]) if place else None
        if int(bound) < 0:
            rest = [piece, after] if bound is start else [after]
            measured = concatenation([part for part in rest if part.size])
            bound = -bound
        if measured is not None and not (place == size and bound is stop and not isinstance(bound, TracedInt)):
            call.tracer.tie(bound, measured)
    return piece


@rule("__getitem__", "input index")
def getitem(call: Call) -> Value:
    x = call.value("input")
    index = call["index"]
    items = list(index) if isinstance(index, tuple) else [index]
    return Value(_indexed(call, x, items, plain_shape(call.output)), x.dirty)


def _indexed(call: Call, x: Value, items: list[Any], sizes: list[int]) -> list[Index]:
    """The dimensions of the part of a tensor that an index of any kind names; ``sizes`` are those of the part."""
    consumed = sum(_dims_taken(item) for item in items if item is not Ellipsis)
    if not any(item is Ellipsis for item in items):
        items.append(Ellipsis)
    spread = items.index(Ellipsis) if all(not isinstance(i, Tensor) for i in items) else _ellipsis(items)
    items[spread : spread + 1] = [slice(None)] * (len(x.dims) - consumed)
    dims: list[Index] = []
    position = 0
    advanced: list[int] = []
    for item in items:
        if item is None:
            dims.append(fixed(1, "size 1"))
            continue
        if isinstance(item, (Tensor, list, bool)) or hasattr(item, "__array__"):
            taken = _dims_taken(item)
            for dim in x.dims[position : position + taken]:
                freeze(dim, "gathered by index")
            if isinstance(item, Tensor):
                for dim in call.tracer.value(item).dims:
                    freeze(dim, "index of a gather")
            elif isinstance(item, list) and any(isinstance(part, Tensor) for part in item):
                raise NoRule("a list of tensors as an index")
            advanced.append(len(dims))
            position += taken
            continue
        dim = x.dims[position]
        position += 1
        if isinstance(item, slice):
            if item.step not in (None, 1):
                freeze(dim, "strided slice")
                length = len(range(*slice(item.start, item.stop, item.step).indices(dim.size)))
                dims.append(fixed(length, why_fixed(dim)))
            else:
                dims.append(_segment(call, dim, item.start, item.stop))
        else:
            freeze(dim, "selected by position")
    if advanced:
        extra = len(sizes) - len(dims)
        adjacent = advanced[-1] == advanced[0]
        place = advanced[0] if adjacent else 0
        dims[place:place] = _fresh(sizes[place : place + extra], "result of a gather")
    return dims


def _ellipsis(items: list[Any]) -> int:
    return next(place for place, item in enumerate(items) if item is Ellipsis)


def _dims_taken(item: Any) -> int:
    if item is None:
        return 0
    if isinstance(item, Tensor) and item.dtype in (torch.bool, torch.uint8):
        return len(plain_shape(item))
    return 1


@rule("__setitem__", "input index value")
def setitem(call: Call) -> list[Value]:
    x = call.value("input")
    index = call["index"]
    items = list(index) if isinstance(index, tuple) else [index]
    with torch._C.DisableTorchFunction():
        sizes = plain_shape(call["input"][index])
    part = _indexed(call, x, items, sizes)
    value = call["value"]
    if isinstance(value, Tensor):
        source = call.tracer.value(value)
        extra = max(0, len(source.dims) - len(part))  # leading dimensions of size 1
        _broadcast([Value(part), Value(source.dims[extra:], source.dirty)], sizes)
        dirty = _dirty_after_sum(part, [Value(part), Value(source.dims[extra:], source.dirty)])
    else:
        if isinstance(value, TracedInt):
            call.tracer.watcher.real.append(value)
        dirty = frozenset() if value == 0 else dirty_leaves(*part)
    if not dirty <= x.dirty:
        call.tracer.soil(call["input"], dirty)
    return []


@rule("index_select", "input dim index")
def index_select(call: Call) -> Value:
    x, index = call.value("input"), call.value("index")
    dims = list(x.dims)
    position = call["dim"] % len(dims)
    freeze(dims[position], "source of a selection")
    if index.is_integer_parameter:
        # an integer parameter is a deliberate, learned selection: it may select fewer. Nothing masks an index there,
        # so the selection itself stays non-zero until something that carries the axis masks it (a BatchNorm)
        dims[position] = index.dims[0]
        call.tracer.consume(call["index"], 0)
        return Value(dims, x.dirty | frozenset([find(index.dims[0])]))
    for dim in index.dims:
        freeze(dim, "index of a gather")
    dims[position] = fixed(index.dims[0].size, "result of a gather")
    return Value(dims, x.dirty)


@rule("embedding", "input weight")
def embedding(call: Call) -> Value:
    index, weight = call.value("input"), call.value("weight")
    freeze(weight.dims[0], "gathered by index")
    return Value([*index.dims, weight.dims[1]])


@rule("gather", "input dim index")
def gather(call: Call) -> Value:
    return _gathered(call, "index")


@rule("take_along_dim", "input indices dim")
def take_along_dim(call: Call) -> Value:
    if call["dim"] is None:
        raise NoRule("no dim given")
    return _gathered(call, "indices")


def _gathered(call: Call, key: str) -> Value:
    """Elements are chosen along one dimension; along the others the index runs beside the tensor."""
    x, index = call.value("input"), call.value(key)
    chosen = call["dim"] % len(x.dims)
    dims = []
    for position, (dim, beside) in enumerate(zip(x.dims, index.dims, strict=True)):
        if position == chosen or dim.size != beside.size:
            freeze(dim, "gathered by index")
            freeze(beside, "index of a gather")
            dims.append(fixed(beside.size, "result of a gather"))
        else:
            unify(dim, beside)
            dims.append(dim)
    return Value(dims, x.dirty)


@rule("sort argsort", "input dim descending")
@rule("topk", "input k dim")
def ordered(call: Call) -> Value | list[Value]:
    """Elements are put in order along one dimension; along the others every line is on its own."""
    x = call.value("input")
    which = -1 if call["dim"] is None else call["dim"]
    if isinstance(which, bool):
        raise NoRule("stable=... by position")
    position = which % len(x.dims)
    freeze(x.dims[position], "put in order")
    one = call.output if isinstance(call.output, Tensor) else call.output[0]
    dims = list(x.dims)
    dims[position] = fixed(plain_shape(one)[position], "put in order")
    places = Value(list(dims), dirty_leaves(*dims))
    return places if isinstance(call.output, Tensor) else [Value(dims, x.dirty), places]


@rule("roll", "input shifts dims")
def roll(call: Call) -> Value:
    x = call.value("input")
    which = call["dims"]
    chosen = range(len(x.dims)) if which is None else [which] if isinstance(which, int) else which
    for d in chosen:
        freeze(x.dims[d], "rolled")
    return Value(list(x.dims), x.dirty)


@rule("flip", "input *dims")
def flip(call: Call) -> Value:
    x = call.value("input")
    for d in call["dims"]:
        freeze(x.dims[d], "flipped")
    return Value(list(x.dims), x.dirty)


@rule("triu tril cumsum", "input dim")
def order_matters(call: Call) -> Value:
    x = call.value("input")
    for dim in x.dims:
        freeze(dim, f"{call.name}")
    return Value(list(x.dims), x.dirty)


@rule("meshgrid", "*tensors")
def meshgrid(call: Call) -> list[Value]:
    return [Value(_fresh(plain_shape(out), "constant")) for out in call.output]


# -- tensors made during the pass ---------------------------------------------------------------------------------


@rule("zeros ones full empty rand randn new_zeros new_ones new_full new_empty", "*size")
def create(call: Call) -> Value:
    sizes = [size for size in call["size"] if not isinstance(size, Tensor)]
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = list(sizes[0])
    if sizes and isinstance(sizes[0], (tuple, list)):
        sizes = list(sizes[0])  # full(size, value)
    actual = plain_shape(call.output)
    dims = []
    for position, size in enumerate(actual):
        asked = sizes[position] if position < len(sizes) else None
        may_follow = isinstance(asked, TracedInt) and call.output.is_floating_point()
        dims.append(Index(size) if may_follow else fixed(size, FROM_NO_PARAMETER))
        call.tracer.tie(asked, dims[-1])
    return Value(dims, frozenset() if call.name.endswith("zeros") else dirty_leaves(*dims))


@rule(
    "arange linspace tensor as_tensor scalar_tensor eye from_numpy full_int randint randperm new_tensor",
    "*args",
)
def constant(call: Call) -> Value:
    pending: list[Any] = list(call.args.values())
    while pending:  # a number made of an axis's size is no constant
        item = pending.pop()
        if isinstance(item, TracedInt):
            call.tracer.watcher.real.append(item)
        elif isinstance(item, (tuple, list)):
            pending.extend(item)
    return Value(_fresh(plain_shape(call.output), FROM_NO_PARAMETER))


@rule("uniform normal fill zero random bernoulli", "input value")
def overwrite(call: Call) -> Value:
    if isinstance(call["value"], Tensor):
        raise NoRule("filled by a tensor")
    return _same(call, dirty=True)
