"""Watch one eager forward pass and describe every dimension of every tensor over index sets.

:class:`Tracer` is a ``TorchFunctionMode``: each operator call arrives by name with its arguments, the operator's rule
(see ``rules.py``) relates the dimensions of its inputs and says what the dimensions of its outputs are. A call without a
rule freezes every tensor that it touches and is reported once by name. Whatever a rule says is checked against the real
output's shape, so a wrong rule costs freedom, never correctness.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .algebra import Index, find, fixed, freeze, is_fixed, leaves, unify
from .provenance import TracedInt, Watcher


@dataclass
class Value:
    """What is known of one tensor.

    ``dims``: one node per dimension. ``dirty``: leaves at whose masked indices the tensor may be non-zero (after a
    sigmoid, say); where the tensor is not dirty, zeroing an index at its producers zeroes it here.
    """

    dims: list[Index]
    dirty: frozenset[Index] = frozenset()
    name: str | None = None
    readers: list[tuple[str, str]] = field(default_factory=list)
    is_integer_parameter: bool = False


@dataclass
class CostTerm:
    """MACs of one call: ``coefficient`` times the product of the sizes of ``dims``."""

    coefficient: float
    dims: tuple[Index, ...]


@dataclass
class Contraction:
    """A convolution or linear layer that sums over dimension ``dim`` of a weight."""

    summed: Index
    module: str
    weight: str
    dim: int
    has_padding: bool
    output: Value | None = None


@dataclass
class Call:
    """One operator call: its name, its arguments by name, and the tracer to ask."""

    name: str
    args: dict[str, Any]
    output: Any
    tracer: Tracer

    def __getitem__(self, key: str) -> Any:
        return self.args.get(key)

    def value(self, key: str) -> Value:
        return self.tracer.value(self.args[key])


Rule = Callable[[Call], Any]
RULES: dict[str, tuple[tuple[str, ...], Rule]] = {}
PASSIVE: set[str] = set()


def rule(names: str, signature: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators. ``signature`` names the positional arguments; ``*rest`` takes what follows."""

    def register(function: Rule) -> Rule:
        for name in names.split():
            RULES[name] = (tuple(signature.split()), function)
        return function

    return register


_FUNCTIONAL_NAMES = {id(value): name for name, value in vars(F).items() if callable(value)}
_ALIASES = {"self": "input", "axis": "dim", "axes": "dim", "other": "other"}


def operator_name(function: Callable[..., Any]) -> str:
    """One spelling for the function, method, in-place and operator forms of an operator: ``add`` for ``__iadd__``."""
    name = getattr(function, "__name__", "")
    if name == "__get__":  # a tensor property such as Tensor.shape
        return f"{function.__self__.__name__}.__get__"  # type: ignore[attr-defined]
    if name == "fn" or id(function) in _FUNCTIONAL_NAMES:
        name = _FUNCTIONAL_NAMES.get(id(function), name)
    if name.startswith("__") and name.endswith("__"):
        inner = name[2:-2]
        if inner in ("getitem", "setitem", "len", "iter", "contains"):
            return name
        name = inner[1:] if inner[0] in "ir" and inner[1:] in _BINARY_DUNDERS else inner
        if inner == "rsub":
            name = "rsub"
        elif inner in ("rtruediv", "rdiv"):
            name = "rdiv"
        elif inner == "rpow":
            name = "rpow"
    return name.strip("_") if name.strip("_") else name


_BINARY_DUNDERS = {"add", "sub", "mul", "truediv", "div", "pow", "matmul", "floordiv", "mod", "and", "or", "xor"}


class Tracer(TorchFunctionMode):
    """Relates the dimensions of all tensors in a forward pass. See the module docstring."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.watcher = Watcher()
        self.costs: list[CostTerm] = []
        self.contractions: list[Contraction] = []
        self.consumed: set[tuple[str, int]] = set()
        self.scales: list[str] = []
        self.ties: list[tuple[TracedInt, Index, str]] = []
        self.zero_checks: list[tuple[Index, tuple[frozenset[Index], ...]]] = []
        self.without_rule: dict[str, str] = {}
        self.parameters: dict[str, Value] = {}
        self._values: dict[int, tuple[weakref.ref[Tensor], Value]] = {}
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._stack: list[str] = [""]
        self._tensor_names: dict[int, str] = {}
        persistent = set(model.state_dict(keep_vars=True))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if id(tensor) in self._tensor_names:
                continue
            is_integer_parameter = isinstance(tensor, nn.Parameter) and not tensor.is_floating_point()
            if tensor.is_floating_point() or is_integer_parameter:
                dims = [Index(size) for size in tensor.shape]
            else:
                dims = [fixed(size, "integer buffer") for size in tensor.shape]
            if name not in persistent:
                for dim in dims:
                    freeze(dim, "buffer that checkpoints leave out")
            value = Value(dims, name=name, is_integer_parameter=is_integer_parameter)
            self.parameters[name] = value
            self._tensor_names[id(tensor)] = name
            self._remember(tensor, value)
        self._handles: list[Any] = []

    # -- the module being run -------------------------------------------------------------------------------------

    def __enter__(self) -> Tracer:
        register = nn.modules.module.register_module_forward_pre_hook
        self._handles = [
            register(lambda module, _: self._stack.append(self._paths.get(id(module), self.module))),
            nn.modules.module.register_module_forward_hook(lambda *_: self._leave_module(), always_call=True),
        ]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*exception)

    def _leave_module(self) -> None:
        self._stack.pop()

    @property
    def module(self) -> str:
        """Path of the module whose forward is running."""
        return self._stack[-1]

    # -- what is known of tensors ---------------------------------------------------------------------------------

    def _remember(self, tensor: Tensor, value: Value) -> None:
        self._values[id(tensor)] = (weakref.ref(tensor), value)

    def value(self, tensor: Tensor) -> Value:
        """What is known of a tensor; one that was never seen is a constant of fixed dimensions."""
        entry = self._values.get(id(tensor))
        if entry is not None and entry[0]() is tensor:
            return entry[1]
        value = Value([fixed(size, "constant") for size in plain_shape(tensor)])
        self._remember(tensor, value)
        return value

    def knows(self, tensor: Tensor) -> bool:
        entry = self._values.get(id(tensor))
        return entry is not None and entry[0]() is tensor

    # -- integers -------------------------------------------------------------------------------------------------

    def tie(self, size: Any, dim: Index) -> None:
        """Relate an integer that the program passed to the dimension that it measures."""
        if isinstance(size, TracedInt):
            self.ties.append((size, dim, self.module))
        elif isinstance(size, int) and size != -1 and not is_fixed(dim):
            freeze(dim, f"integer {size} in the forward pass of {self.module or 'the model'}")

    def shape(self, tensor: Tensor) -> torch.Size:
        dims = self.value(tensor).dims
        return torch.Size([TracedInt(dim.size, dim, self.watcher) for dim in dims])

    # -- calls ----------------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = operator_name(func)
        if name in PASSIVE:
            return func(*args, **kwargs)
        if name == "shape.__get__":
            return self.shape(args[0])
        if name == "size":
            which = args[1] if len(args) > 1 else kwargs.get("dim")
            return self.shape(args[0]) if which is None else self.shape(args[0])[which]
        if name in ("__len__",):
            return func(*args, **kwargs)
        before = [tensor for tensor in tensors_in((args, kwargs))]
        for tensor in before:
            self.value(tensor).readers.append((name, self.module))
        if name in RULES:
            signature, function = RULES[name]
            bound = _bind(signature, args, kwargs)
            output = func(*args, **kwargs)
            try:
                described = function(Call(name, bound, output, self))
            except (KeyError, IndexError, TypeError, ValueError, AttributeError, NoRule) as error:
                self._give_up(name, before, output, reason=f"its rule does not cover this call ({error})")
                return output
            self._record(name, output, described, before)
        else:
            output = func(*args, **kwargs)
            if any(True for _ in tensors_in(output)) or name.startswith("__setitem__"):
                self._give_up(name, before, output, reason="no rule")
        return output

    def _record(self, name: str, output: Any, described: Any, inputs: list[Tensor]) -> None:
        outputs = list(tensors_in(output))
        values = [described] if isinstance(described, Value) else list(described or [])
        if len(values) < len(outputs):
            values += [
                Value([fixed(size, f"extra output of {name}") for size in plain_shape(out)])
                for out in outputs[len(values) :]
            ]
        for out, value in zip(outputs, values, strict=False):
            if [dim.size for dim in value.dims] != plain_shape(out):
                self._give_up(name, inputs, output, reason="its rule gave a wrong shape")
                return
        for out, value in zip(outputs, values, strict=False):
            if self.knows(out) and out is not None and any(out is tensor for tensor in inputs):
                # in place: the object stays, its dimensions are those of the result
                old = self.value(out)
                for a, b in zip(old.dims, value.dims, strict=True):
                    if a.size != 1:
                        unify(a, b)
                value.name = old.name
            self._remember(out, value)

    def _give_up(self, name: str, inputs: Iterable[Tensor], output: Any, reason: str) -> None:
        prunable = False
        for tensor in inputs:
            for dim in self.value(tensor).dims:
                prunable = prunable or not is_fixed(dim)
                freeze(dim, f"operator {name}: {reason}")
        for tensor in tensors_in(output):
            reasons = f"operator {name}: {reason}"
            self._remember(tensor, Value([fixed(size, reasons) for size in plain_shape(tensor)]))
        if prunable:
            self.without_rule.setdefault(name, self.module)

    # -- facts that rules state -----------------------------------------------------------------------------------

    def count(self, coefficient: float, *dims: Index) -> None:
        """Add MACs."""
        self.costs.append(CostTerm(coefficient, dims))

    def consume(self, tensor: Tensor, dim: int) -> None:
        """Say that a parameter dimension is summed over: it reads an axis and does not produce it."""
        value = self.value(tensor)
        if value.name is not None:
            self.consumed.add((value.name, dim % max(1, len(value.dims))))

    def needs_zero(self, summed: Index, *dirty: frozenset[Index]) -> None:
        """The removal of an index of ``summed`` is exact only if one of the operands is zero there."""
        if all(dirty):
            self.zero_checks.append((summed, dirty))

    def mark_scale(self, tensor: Any) -> None:
        """Say that a one-dimensional parameter multiplies its axis index by index."""
        if isinstance(tensor, Tensor):
            name = self.value(tensor).name
            if name is not None and name in self.parameters and name not in self.scales:
                self.scales.append(name)


class NoRule(Exception):
    """A rule meets a form of its operator that it does not cover."""


def tensors_in(nested: Any) -> Iterable[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, (tuple, list)):
        for item in nested:
            yield from tensors_in(item)
    elif isinstance(nested, Mapping):
        for item in nested.values():
            yield from tensors_in(item)


def plain_shape(tensor: Tensor) -> list[int]:
    """A tensor's sizes as plain integers, also while a trace is running."""
    with torch._C.DisableTorchFunction():
        return [int(size) for size in tensor.size()]


def dirty_leaves(*nodes: Index) -> frozenset[Index]:
    """The prunable leaves below nodes, as a set for :attr:`Value.dirty`."""
    return frozenset(leaf for node in nodes for leaf in leaves(node) if not leaf.frozen)


def overlaps(dirty: frozenset[Index], node: Index) -> set[Index]:
    """Leaves of a node that are dirty; both sides are resolved now, after all bindings."""
    below = {leaf for item in dirty for leaf in leaves(item)}
    return below & set(leaves(find(node)))


def _bind(signature: tuple[str, ...], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound = {_ALIASES.get(key, key): value for key, value in kwargs.items()}
    for position, name in enumerate(signature):
        if name.startswith("*"):
            rest = tuple(args[position:])
            if len(rest) == 1 and isinstance(rest[0], (tuple, list, torch.Size)):
                rest = tuple(rest[0])
            if rest or name[1:] not in bound:
                bound[name[1:]] = rest
            elif isinstance(bound[name[1:]], int):
                bound[name[1:]] = (bound[name[1:]],)
            break
        if position < len(args):
            bound[name] = args[position]
    return bound
