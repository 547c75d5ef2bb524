"""What a forward pass computes: every operator call, with sizes that follow the axes, and how long it takes in place.

:func:`record` watches the pass once more in the way of :func:`hf_compress.find_axes` and describes each call in plain
data. Contractions (linear layers, convolutions, attention, matrix products) are described so that they can be timed
alone at other sizes; of all other calls the numbers read and written are counted. :func:`profile` times the calls where
they stand, with the caches and memory layouts that they meet there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from ..axes import AxisGraph, find_axes
from ..axes.algebra import Index, Polynomial, add_into, multiply, positions, size_polynomial
from ..axes.finding import Inputs, run_model, undisturbed
from ..axes.tracing import PASSIVE, RULES, Tracer, operator_name, tensors_in
from ..errors import PlanError
from .operator_times import stopwatch

Law = tuple[tuple[tuple[str, ...], float], ...]
"""A number as a polynomial in the sizes of axes: (axis names with repetition, coefficient) pairs."""

Signature = tuple[Any, ...]
"""What calls must share to take equally long: operator, shapes and memory layout."""

_SIZES = {"size", "numel", "nelement", "shape.__get__"}
_PASSES = (5, 25)  # fewest and most; between them as many as fit into a second


@dataclass(frozen=True)
class Operation:
    """One operator call.

    Attributes:
        kind: ``linear``, ``conv``, ``attention`` or ``matmul``; ``other`` for what is not timed alone.
        settings: what a call of this kind needs besides ``sizes``: kernel, stride, mask and the like.
        sizes: in the order of the kind's builder in ``operator_times``.
        work: multiply-accumulates, where the call has any that follow the axes; else numbers read and written.
        signature: to find the call in a :func:`profile`.
    """

    kind: str
    settings: tuple[Any, ...]
    sizes: tuple[Law, ...]
    work: Law
    signature: Signature


def record(model: nn.Module, axes: AxisGraph, example_inputs: Inputs) -> list[Operation]:
    """Describe every operator call of a forward pass.

    Args:
        model: the model that ``axes`` were found in.
        axes: from :func:`hf_compress.find_axes`.
        example_inputs: as there.

    Raises:
        PlanError: when the axes belong to another model, or to another size of this one.
    """
    recorder = _Recorder()
    hooks = [
        model.register_forward_pre_hook(recorder.start),
        model.register_forward_hook(recorder.stop, always_call=True),
    ]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it was said when the axes were found
            found = find_axes(model, example_inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if found.parameter_dims != axes.parameter_dims or list(found.axes) != list(axes.axes):
        raise PlanError(
            f"the axes do not belong to this {type(model).__name__} as it is now. Find them again with find_axes(model)."
        )
    assert recorder.tracer is not None
    names = _names(recorder.tracer, axes)
    return [_operation(call, names) for call in recorder.calls]


@dataclass
class _Call:
    """What the recorder noted; sizes are nodes, which later calls may still bind."""

    kind: str
    settings: tuple[Any, ...]
    sizes: list[list[Index]]
    costs: list[tuple[float, tuple[Index, ...]]]
    traffic: list[list[Index]]
    signature: Signature


class _Recorder(TorchFunctionMode):
    """Lies on top of the tracer for the duration of the pass: each call is noted when the tracer knows its result."""

    def __init__(self) -> None:
        super().__init__()
        self.tracer: Tracer | None = None
        self.calls: list[_Call] = []

    def start(self, *_: Any) -> None:
        mode = _get_current_function_mode()
        assert isinstance(mode, Tracer)
        self.tracer = mode
        self.calls = []  # the axes may need a second pass, which is then the one that counts
        self.__enter__()

    def stop(self, *_: Any) -> None:
        self.__exit__(None, None, None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = operator_name(func)
        if name in PASSIVE or name in _SIZES:
            return func(*args, **kwargs)
        tracer = self.tracer
        assert tracer is not None
        inputs = tensors_in((args, kwargs))
        number = len(tracer.costs)
        output = func(*args, **kwargs)
        outputs = tensors_in(output)
        described: _Described | None = None
        costs = [(term.coefficient, term.dims) for term in tracer.costs[number:]]
        if costs and name in _DESCRIPTIONS and all(tracer.knows(tensor) for tensor in (*inputs, *outputs)):
            bound = dict(zip(RULES[name][0], args, strict=False)) | dict(kwargs)
            with torch._C.DisableTorchFunction():
                described = _DESCRIPTIONS[name](tracer, bound, outputs[0])
        kind, settings, sizes = described or ("other", (), [])
        traffic = [tracer.value(tensor).dims for tensor in (*inputs, *outputs) if tracer.knows(tensor)]
        self.calls.append(_Call(kind, settings, sizes, costs, traffic, _signature(name, inputs, outputs)))
        return output


def _signature(name: str, inputs: list[Tensor], outputs: list[Tensor]) -> Signature:
    with torch._C.DisableTorchFunction():
        layouts = tuple((*tensor.shape, *_plain_strides(tensor)) for tensor in inputs)
        return name, layouts, tuple(tuple(tensor.shape) for tensor in outputs)


def _plain_strides(tensor: Tensor) -> tuple[int, ...]:
    return () if tensor.is_contiguous() else tensor.stride()


# -- contractions, described for timing them alone ----------------------------------------------------------------

_Described = tuple[str, tuple[Any, ...], list[list[Index]]]


def _linear(tracer: Tracer, args: Mapping[str, Any], output: Tensor) -> _Described | None:
    x, weight = tracer.value(args["input"]).dims, tracer.value(args["weight"]).dims
    if len(weight) != 2:
        return None
    return "linear", (args.get("bias") is not None,), [x[:-1], [weight[1]], [weight[0]]]


def _conv(tracer: Tracer, args: Mapping[str, Any], output: Tensor) -> _Described | None:
    x, weight = args["input"], args["weight"]
    spatial = weight.dim() - 2
    dims, filters = tracer.value(x).dims, tracer.value(weight).dims
    if spatial != 2 or x.dim() != 4 or isinstance(args.get("padding"), str):
        return None
    is_channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    pairs = [_pair(args.get(key), default) for key, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    settings = (*x.shape[2:], *weight.shape[2:], *pairs, args.get("bias") is not None, is_channels_last)
    return "conv", settings, [dims[:1], [dims[1]], [filters[1]], [filters[0]]]


def _pair(value: Any, default: int) -> tuple[int, ...]:
    value = default if value is None else value
    pair = (value,) * 2 if isinstance(value, int) else tuple(value)
    return tuple(int(item) for item in (pair * 2)[:2])


def _attention(tracer: Tracer, args: Mapping[str, Any], output: Tensor) -> _Described | None:
    query, key, value = (tracer.value(args[name]).dims for name in ("query", "key", "value"))
    if len({len(query), len(key), len(value)}) != 1:
        return None
    mask = args.get("attn_mask")
    # of a mask it matters whether the heads share it, not where it comes from
    kind = "none" if mask is None else "shared" if mask.dim() < 3 or mask.shape[-3] == 1 else "own"
    sizes = [query[:-2], [query[-2]], [key[-2]], [query[-1]], [value[-1]]]
    return "attention", (kind, bool(args.get("is_causal"))), sizes


def _matmul(tracer: Tracer, args: Mapping[str, Any], output: Tensor) -> _Described | None:
    a, b = tracer.value(args["input"]).dims, tracer.value(args.get("other", args.get("mat2"))).dims
    out = tracer.value(output).dims
    if len(b) == 2:
        return "linear", (False,), [a[:-1], [b[0]], [b[1]]]
    return "matmul", (), [out[:-2], [a[-2]], [a[-1]], [b[-1]]]


_DESCRIPTIONS: dict[str, Callable[[Tracer, Mapping[str, Any], Tensor], _Described | None]] = {
    "linear": _linear,
    "conv2d": _conv,
    "scaled_dot_product_attention": _attention,
    "matmul": _matmul,
    "bmm": _matmul,
}


# -- from nodes to names ------------------------------------------------------------------------------------------


def _names(tracer: Tracer, axes: AxisGraph) -> dict[Index, str]:
    """The axis of every leaf: the two have the same positions in the parameters."""
    known = {
        (member.parameter, member.dim, tuple(member.positions.shape), member.positions.numpy().tobytes()): axis.name
        for axis in axes
        for member in axis.members
    }
    names: dict[Index, str] = {}
    for parameter, value in tracer.parameters.items():
        for dim, node in enumerate(value.dims):
            for leaf, where in positions(node).items():
                name = known.get((parameter, dim, where.shape, where.tobytes()))
                if name is not None:
                    names[leaf] = name
    return names


def _operation(call: _Call, names: Mapping[Index, str]) -> Operation:
    work: Polynomial = {}
    for coefficient, dims in call.costs:
        add_into(work, _size(dims, names), int(coefficient))
    if not any(work):  # no contraction, or one of fixed size
        work = {}
        for shape in call.traffic:
            add_into(work, _size(shape, names))
    kind, sizes = call.kind, [_size(dims, names) for dims in call.sizes]
    if kind == "conv":
        batch, channels, inner, out = sizes
        groups: Polynomial | None = {(): 1}
        per_group: Polynomial | None = out
        if call.sizes[1][0].size != call.sizes[2][0].size:
            groups = _quotient(channels, inner)
            per_group = None if groups is None else _quotient(out, groups)
        if groups is None or per_group is None:
            kind, sizes = "other", []
        else:
            sizes = [batch, groups, inner, per_group]
    return Operation(kind, call.settings, tuple(_law(size, names) for size in sizes), _law(work, names), call.signature)


def _size(dims: Sequence[Index], names: Mapping[Index, str]) -> Polynomial:
    """Product of sizes; leaves that are no axis keep theirs."""
    result: Polynomial = {}
    for monomial, coefficient in multiply([size_polynomial(dim) for dim in dims]).items():
        kept = tuple(leaf for leaf in monomial if leaf in names)
        factor = prod(leaf.size for leaf in monomial if leaf not in names)
        result[kept] = result.get(kept, 0) + coefficient * factor
    return result


def _quotient(dividend: Polynomial, divisor: Polynomial) -> Polynomial | None:
    """Exact division by a single monomial; None where it does not go."""
    if len(divisor) != 1:
        return {(): 1} if dividend == divisor else None
    ((factors, number),) = divisor.items()
    result: Polynomial = {}
    for monomial, coefficient in dividend.items():
        rest = list(monomial)
        for leaf in factors:
            if leaf not in rest:
                return None
            rest.remove(leaf)
        if coefficient % number:
            return None
        result[tuple(rest)] = coefficient // number
    return result


def _law(polynomial: Polynomial, names: Mapping[Index, str]) -> Law:
    return tuple((tuple(names[leaf] for leaf in monomial), float(c)) for monomial, c in polynomial.items())


# -- time in place ------------------------------------------------------------------------------------------------


class _Stopwatch(TorchFunctionMode):
    """Notes the seconds of every call, by signature, and those between calls, by place."""

    def __init__(self, wait: Callable[[], object], clock: Callable[[], float]) -> None:
        super().__init__()
        self.wait, self.clock = wait, clock
        self.found: dict[Signature, list[float]] = {}
        self.gaps: dict[int, list[float]] = {}
        self._place, self._end = 0, 0.0

    def __enter__(self) -> _Stopwatch:
        self._place, self._end = 0, self.clock()
        super().__enter__()
        return self

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = operator_name(func)
        if name in PASSIVE or name in _SIZES:
            return func(*args, **kwargs)
        inputs = tensors_in((args, kwargs))
        self.wait()
        start = self.clock()
        output = func(*args, **kwargs)
        self.wait()
        end = self.clock()
        self.found.setdefault(_signature(name, inputs, tensors_in(output)), []).append(end - start)
        self.gaps.setdefault(self._place, []).append(start - self._end)
        self._place += 1
        self._end = self.clock()
        return output


@dataclass(frozen=True)
class Profile:
    """Where the time of a forward pass goes.

    Attributes:
        calls_ms: signature -> one call, in place.
        between_ms: what a pass spends between its calls.
    """

    calls_ms: dict[Signature, float]
    between_ms: float


def profile(model: nn.Module, example_inputs: Inputs) -> Profile:
    """Time the calls of the forward pass, and what is between them.

    Runs with the current number of torch threads, for about two seconds, more when single passes are slow. The lower
    quintile counts: what else the machine does can only add to a time. A whole pass may be too long to run undisturbed
    even once, so its time serves as an upper bound alone.
    """
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    wait, clock = stopwatch(device)
    whole: list[float] = []
    watch = _Stopwatch(wait, clock)
    with undisturbed(model), torch.inference_mode():
        run_model(model, example_inputs)
        passes = _PASSES[1]
        while len(whole) < passes:
            wait()
            start = clock()
            run_model(model, example_inputs)
            wait()
            whole.append(clock() - start)
            passes = min(max(int(1 / _quiet(whole)), _PASSES[0]), _PASSES[1])
            with watch:
                run_model(model, example_inputs)
    calls = {signature: _quiet(times) for signature, times in watch.found.items()}
    inside = sum(calls[signature] * len(times) / len(whole) for signature, times in watch.found.items())
    between = max(0.0, min(sum(map(_quiet, watch.gaps.values())), _quiet(whole) - inside))
    return Profile({signature: 1e3 * seconds for signature, seconds in calls.items()}, 1e3 * between)


def _quiet(times: list[float]) -> float:
    return sorted(times)[len(times) // 5]
