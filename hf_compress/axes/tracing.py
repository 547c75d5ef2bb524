"""Watch one eager forward pass and describe every dimension of every tensor over index sets.

:class:`Tracer` is a ``TorchFunctionMode``: each operator call arrives by name with its arguments, the operator's rule
(see ``rules.py``) relates the dimensions of its inputs and says what the dimensions of its outputs are. A call without a
rule freezes every tensor that it touches and is reported once by name. Three checks make a faulty rule cost freedom
rather than correctness: what it says must fit the real output's shape, it must have looked at every tensor argument, and
whatever it raises counts as having no rule.
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

from .algebra import Index, find, fixed, freeze, is_fixed, leaves, product, unify
from .provenance import TracedInt, Watcher
from .scaling import _LAYERS, Gain, Gains
from .shortcuts import stand_in


@dataclass
class Value:
    """What is known of one tensor.

    ``dims``: one node per dimension. ``dirty``: leaves at whose masked indices the tensor may be non-zero (after a
    sigmoid, say); where the tensor is not dirty, zeroing an index at its producers zeroes it here. ``name``: of a
    parameter or buffer; ``origin``: the parameter or buffer that this is a cast or a view of; ``gain``: what the layer
    that made the tensor can absorb.
    """

    dims: list[Index]
    dirty: frozenset[Index] = frozenset()
    name: str | None = None
    origin: Value | None = None
    readers: list[tuple[str, str]] = field(default_factory=list)
    is_integer_parameter: bool = False
    gain: Gain | None = None

    @property
    def stored(self) -> Value | None:
        """The parameter or buffer that this tensor is, or shows in another layout; None for an activation."""
        return self if self.name is not None else self.origin


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
    """One operator call: its name, its arguments by name, and the tracer to ask. Remembers what was asked for."""

    name: str
    args: dict[str, Any]
    output: Any
    tracer: Tracer
    asked: set[str] = field(default_factory=set)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return self.args.get(key)

    def value(self, key: str) -> Value:
        self.asked.add(key)
        return self.tracer.value(self.args[key])

    def overlooked(self) -> str | None:
        """The first argument that holds a tensor and that the rule did not ask for."""
        for key, value in self.args.items():
            if key not in self.asked and tensors_in(value):
                return key.strip("*")
        return None


Rule = Callable[[Call], Any]
RULES: dict[str, tuple[tuple[str, ...], Rule]] = {}
PASSIVE: set[str] = set()
LAYOUT: set[str] = set()
"""Operators whose result shows (parts of) their first argument in another layout or type."""


def rule(names: str, signature: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators. ``signature`` names the positional arguments; ``*rest`` takes what follows."""

    def register(function: Rule) -> Rule:
        for name in names.split():
            RULES[name] = (tuple(signature.split()), function)
        return function

    return register


_FUNCTIONAL_NAMES = {id(value): name for name, value in vars(F).items() if callable(value)}
_ALIASES = {
    "self": "input", "x": "input", "a": "input", "x1": "input", "x2": "other",
    "axis": "dim", "axes": "dim", "keepdims": "keepdim",
}  # fmt: skip


def operator_name(function: Callable[..., Any]) -> str:
    """One spelling for the function, method, in-place and operator forms of an operator: ``add`` for ``__iadd__``."""
    name = getattr(function, "__name__", "")
    if name in ("__get__", "__set__"):  # a tensor property such as Tensor.shape
        return f"{function.__self__.__name__}.{name}"  # type: ignore[attr-defined]
    if name == "fn" or id(function) in _FUNCTIONAL_NAMES:
        name = _FUNCTIONAL_NAMES.get(id(function), name)
    if name.startswith("__") and name.endswith("__"):
        inner = name[2:-2]
        if inner in ("getitem", "setitem", "len", "iter", "contains"):
            return name
        if inner[0] == "i" and inner[1:] in _BINARY_DUNDERS | _SYMMETRIC_DUNDERS:
            return inner[1:]
        return inner[1:] if inner[0] == "r" and inner[1:] in _SYMMETRIC_DUNDERS else inner
    return name.strip("_") or name


_SYMMETRIC_DUNDERS = {"add", "mul", "and", "or", "xor"}
_BINARY_DUNDERS = {"sub", "truediv", "div", "pow", "matmul", "floordiv", "mod"}


class Tracer(TorchFunctionMode):
    """Relates the dimensions of all tensors in a forward pass. See the module docstring."""

    def __init__(self, model: nn.Module, constants: Sequence[Tensor] = (), in_full: bool = False):
        super().__init__()
        self._in_full = in_full
        self.watcher = Watcher()
        self.gains = Gains(self.watcher)
        self.costs: list[CostTerm] = []
        self.contractions: list[Contraction] = []
        self._consumed: dict[tuple[str, int], int] = {}
        self.scales: list[str] = []
        self.ties: list[tuple[TracedInt, Index, str]] = []
        self.zero_checks: list[tuple[Index, tuple[frozenset[Index], ...]]] = []
        self.without_rule: dict[str, str] = {}
        self.parameters: dict[str, Value] = {}
        self._values: dict[int, tuple[weakref.ref[Tensor], Value]] = {}
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._stack: list[str] = [""]
        self._ran: set[str] = set()
        self.twins: dict[str, str] = {}
        self._tensor_names: dict[int, str] = {}
        # tensors that modules hold beside parameters and buffers are constants; kept alive so that no id is reused
        held = (tensor for module in model.modules() for tensor in tensors_in(vars(module)))
        self._constants = {id(tensor): tensor for tensor in (*held, *constants)}
        self.unexplained: list[Tensor] = []
        persistent = set(model.state_dict(keep_vars=True))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if id(tensor) in self._tensor_names:
                continue
            is_integer_parameter = isinstance(tensor, nn.Parameter) and not tensor.is_floating_point()
            if tensor.is_floating_point() or is_integer_parameter:
                dims = [Index(size) for size in tensor.shape]
            else:
                dims = [fixed(size, "integer buffer") for size in tensor.shape]
            if name not in persistent:  # its values come from code, which knows all of its indices or one for all
                for position, dim in enumerate(dims):
                    if not _repeats_along(tensor, position):
                        freeze(dim, "buffer that checkpoints leave out")
            value = Value(dims, name=name, is_integer_parameter=is_integer_parameter)
            self.parameters[name] = value
            self._tensor_names[id(tensor)] = name
            self._remember(tensor, value)
        self._handles: list[Any] = []
        self._vmap = torch.vmap
        self._mapping = 0
        self._is_watching = False

    # -- the module being run -------------------------------------------------------------------------------------

    def __enter__(self) -> Tracer:
        register = nn.modules.module.register_module_forward_pre_hook
        self._handles = [
            register(lambda module, _: self._enter_module(module)),
            nn.modules.module.register_module_forward_hook(lambda *_: self._leave_module(), always_call=True),
        ]
        self._is_watching = True
        torch.vmap = self._map  # type: ignore[assignment]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._is_watching = False
        torch.vmap = self._vmap
        for handle in self._handles:
            handle.remove()
        super().__exit__(*exception)

    def _enter_module(self, module: nn.Module) -> None:
        path = self._paths.get(id(module), self.module)
        self._stack.append(path)
        self._ran.add(path)

    def _map(self, function: Callable[..., Any], *settings: Any, **further: Any) -> Callable[..., Any]:
        """``torch.vmap`` while watched: what goes in stays whole, since fewer dimensions are seen inside than there are."""
        mapped = self._vmap(function, *settings, **further)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._keep_whole((args, kwargs))
            self._mapping += 1
            try:
                output = mapped(*args, **kwargs)
            finally:
                self._mapping -= 1
            for tensor in [] if self._mapping else tensors_in(output):
                self._remember(tensor, Value([fixed(size, "result of vmap") for size in plain_shape(tensor)]))
            return output

        return call

    def _keep_whole(self, nested: Any) -> None:
        for tensor in tensors_in(nested):
            if self.knows(tensor):
                value = self.value(tensor)
                self.gains.use(value.gain)
                for dim in value.dims:
                    freeze(dim, "used under vmap")

    def _leave_module(self) -> None:
        self._stack.pop()

    @property
    def idle(self) -> list[str]:
        """Parameters and buffers that no operator read and whose module did not run."""
        return [name for name, value in self.unread() if name.rpartition(".")[0] not in self._ran]

    def ran_inside(self, path: str) -> bool:
        """Whether a module or one of its parts ran."""
        return any(ran == path or ran.startswith(f"{path}.") for ran in self._ran)

    def unread(self) -> list[tuple[str, Value]]:
        """Parameters and buffers that no operator read."""
        return [(name, value) for name, value in self.parameters.items() if not value.readers]

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
        if self._is_watching and id(tensor) not in self._constants:
            self.unexplained.append(tensor)
            self._distrust()
        value = Value([fixed(size, FROM_NO_PARAMETER) for size in plain_shape(tensor)])
        self._remember(tensor, value)
        return value

    def _distrust(self) -> None:
        """A tensor came from nowhere: compiled code may have made it from anything that was there before."""
        self.without_rule.setdefault(UNWATCHED, self.module)
        prefix = f"{self.module}." if self.module else ""
        for reference, value in list(self._values.values()):
            is_near = value.name is None or value.readers or value.name.startswith(prefix)
            if is_near and reference() is not None:
                for dim in value.dims:
                    freeze(dim, UNWATCHED)

    def knows(self, tensor: Tensor) -> bool:
        entry = self._values.get(id(tensor))
        return entry is not None and entry[0]() is tensor

    # -- integers -------------------------------------------------------------------------------------------------

    def tie(self, size: Any, dim: Index) -> None:
        """Relate an integer that the program passed to the dimension that it measures."""
        if isinstance(size, TracedInt) and size != -1:
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
        if self._mapping:
            self._keep_whole((args, kwargs))
            return func(*args, **kwargs)
        name = operator_name(func)
        if name in PASSIVE:
            return func(*args, **kwargs)
        if name == "shape.__get__":
            return self.shape(args[0])
        if name == "size":
            which = args[1] if len(args) > 1 else kwargs.get("dim")
            return self.shape(args[0]) if which is None else self.shape(args[0])[which]
        if name in ("numel", "nelement"):
            return TracedInt(func(*args, **kwargs), product(self.value(args[0]).dims), self.watcher)
        before = tensors_in((args, kwargs))
        values = [self.value(tensor) for tensor in before]
        for position, value in enumerate(values):
            if value.stored is None:
                value.readers.append((name, self.module))
            elif name not in LAYOUT or position:  # a view of a parameter is a use of it when it is used itself
                value.stored.readers.append((name, self.module))
        gains = [value.gain for value in values]
        if name not in RULES:
            output = func(*args, **kwargs)
            self.gains.use(*gains)
            self._give_up(name, before, output, reason="no rule")
            return output
        signature, function = RULES[name]
        call = Call(name, _bind(signature, args, kwargs), None, self)
        output = None if self._in_full else stand_in(name, call.args)
        call.output = output = func(*args, **kwargs) if output is None else output
        try:
            described = function(call)
            overlooked = call.overlooked()
            if overlooked is not None:
                raise NoRule(f"tensor argument {overlooked!r}")
        except Exception as error:  # whatever a rule trips over, the model's own pass goes on
            self.gains.use(*gains)
            self._give_up(name, before, output, reason=f"its rule does not cover this call ({error})")
            return output
        self._record(name, output, described, before)
        if name in _LAYERS or any(gains):
            self._follow_gains(call, func, (args, kwargs), before, gains)
        return output

    def _follow_gains(
        self, call: Call, func: Callable[..., Any], given: Any, inputs: list[Tensor], gains: list[Gain | None]
    ) -> None:
        """Say what the layers behind the arguments, or the layer that was called, can absorb of the output."""
        outputs = tensors_in(call.output)
        if call.name in _LAYERS:
            self.gains.use(*gains)
            self.value(outputs[0]).gain = self._layer_gain(call)
        elif call.name == "scaled_dot_product_attention":
            pass  # its rule says what is used, and with which factor
        elif any(out is tensor for out in outputs for tensor in inputs):
            self.gains.use(*gains)  # other views of the tensor would not know
        else:
            is_layout = call.name in LAYOUT
            args, kwargs = given
            followed = self.gains.follow(call.name, func, args, kwargs, gains, is_layout, len(outputs))
            for out, gain in zip(outputs, followed, strict=False):
                self.value(out).gain = gain

    def _layer_gain(self, call: Call) -> Gain | None:
        """The gain of a layer's output; None where its weight or bias is no parameter of its own."""
        weight_name, bias_name, dim = _LAYERS[call.name]
        held = [(call.args.get(weight_name), dim), (call.args.get(bias_name), 0)]
        weight = call.args.get(weight_name)
        if not isinstance(weight, Tensor) or call.args.get("training") or {"beta", "alpha"} & set(call.args):
            return None
        parameters = []
        for tensor, at in held:
            if isinstance(tensor, Tensor):
                name = self.value(tensor).name
                if name is None:
                    return None
                parameters.append((name, at))
        rank = len(plain_shape(weight))
        position = -1 if call.name in ("linear", "addmm") else 1 if call.name == "batch_norm" else 1 - rank
        shape = plain_shape(call.output)
        return self.gains.begin(parameters, shape[position], shape, position)

    def _record(self, name: str, output: Any, described: Any, inputs: list[Tensor]) -> None:
        outputs = tensors_in(output)
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
        source = self.value(inputs[0]).stored if inputs and name in LAYOUT else None
        for out, value in zip(outputs, values, strict=False):
            value.origin = source
            if any(out is tensor for tensor in inputs):
                # in place: the object stays, its dimensions are those of the result
                old = self.value(out)
                for a, b in zip(old.dims, value.dims, strict=True):
                    if a.size != 1:
                        unify(a, b)
                value.name, value.origin = old.name, old.origin
                value.readers = old.readers if old.name is not None else []
                if not value.dirty <= old.dirty:
                    self.soil(out, value.dirty)
            self._remember(out, value)

    def soil(self, changed: Tensor, dirty: frozenset[Index]) -> None:
        """A tensor was changed in place: its views, and what it is a view of, may no longer be zero either."""
        storage = changed.untyped_storage().data_ptr() if changed.device.type != "meta" else None
        for reference, value in self._values.values():
            tensor = reference()
            if tensor is not None and (storage is None or tensor.untyped_storage().data_ptr() == storage):
                value.dirty |= dirty

    def _give_up(self, name: str, inputs: Iterable[Tensor], output: Any, reason: str) -> None:
        prunable = False
        for tensor in [*inputs, *tensors_in(output)]:
            if not self.knows(tensor):
                continue
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
        """Say that a dimension is summed over: where it belongs to a parameter, that reads an axis."""
        value = self.value(tensor)
        stored = value.stored
        if stored is None or stored.name is None:
            return
        below = {leaf for leaf in leaves(value.dims[dim]) if not leaf.frozen}
        for position, node in enumerate(stored.dims):
            if (position == dim % len(value.dims)) if stored is value else below & set(leaves(node)):
                key = stored.name, position
                self._consumed[key] = self._consumed.get(key, 0) + 1

    @property
    def consumed(self) -> set[tuple[str, int]]:
        """Parameter dimensions that are summed over in every use, so that they read an axis and do not produce it."""
        return {key for key, uses in self._consumed.items() if uses >= len(self.parameters[key[0]].readers)}

    def needs_zero(self, summed: Index, *dirty: frozenset[Index]) -> None:
        """The removal of an index of ``summed`` is exact only if one of the operands is zero there."""
        if all(dirty):
            self.zero_checks.append((summed, dirty))

    def mark_scale(self, tensor: Any) -> None:
        """Say that a one-dimensional parameter multiplies its axis index by index."""
        if isinstance(tensor, Tensor):
            stored = self.value(tensor).stored
            if stored is not None and stored.name is not None and stored.name not in self.scales:
                self.scales.append(stored.name)


FROM_NO_PARAMETER = "values that come from no parameter (positions, masks)"
UNWATCHED = "code that cannot be watched (compiled or scripted)"


class NoRule(Exception):
    """A rule meets a form of its operator that it does not cover."""


_PLAIN = {int, float, bool, str, type(None), TracedInt, slice, torch.dtype, torch.device, set}


def tensors_in(nested: Any) -> list[Tensor]:
    """Every tensor in nested tuples, lists and dicts."""
    found: list[Tensor] = []
    pending = [nested]
    while pending:
        item = pending.pop()
        if type(item) in _PLAIN or isinstance(item, nn.Module):
            continue
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list)):
            pending.extend(reversed(item))
        elif isinstance(item, dict) or (hasattr(item, "values") and isinstance(item, Mapping)):
            pending.extend(reversed(list(item.values())))
    return found


def _repeats_along(tensor: Tensor, dim: int) -> bool:
    """Whether a tensor holds the same values at every index of a dimension."""
    if tensor.is_meta or not tensor.numel():
        return False
    return bool((tensor == tensor.narrow(dim, 0, 1)).all())


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
    if len(args) > len(signature) and not (signature and signature[-1].startswith("*")):
        bound["*further"] = args[len(signature) :]
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
