"""Integers that remember where they came from.

``x.view(batch, tokens, self.head_dim)`` says which attribute must change with an axis, but only to somebody who can see
that the third integer was read from ``head_dim``. While a forward pass is watched, the width attributes of all modules
are :class:`TracedInt`, as are the items of every ``tensor.shape``; arithmetic on them builds an expression, and a use as
a real number (``1 / sqrt(head_dim)``) is noted. One thing cannot be seen: a float that comes first in an operation
(``0.5 * width``) computes with an int without asking it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from .algebra import Index
from .attributes import SIZE_ATTRIBUTES


class AttributeKey(NamedTuple):
    """One integer that a module holds: ``item`` is None, or the place in a tuple or list."""

    module: str
    name: str
    item: int | None


class Expression(NamedTuple):
    """Integer arithmetic over traced integers."""

    function: Callable[[int, int], int]
    left: int
    right: int


Origin = Index | AttributeKey | Expression
EqualityWatcher = Callable[["TracedInt", "TracedInt"], None]
RealUseWatcher = Callable[["TracedInt"], None]


class Watcher:
    """What a trace wants to hear about the integers that it handed out."""

    def __init__(self) -> None:
        self.equal: list[tuple[TracedInt, TracedInt]] = []
        self.real: list[TracedInt] = []


class TracedInt(int):
    """An int with an origin: an axis, a module attribute or an expression over these."""

    origin: Origin
    watcher: Watcher

    def __new__(cls, value: int, origin: Origin, watcher: Watcher) -> TracedInt:
        self = super().__new__(cls, value)
        self.origin = origin
        self.watcher = watcher
        return self

    def _combine(self, other: Any, function: Callable[[int, int], int], swapped: bool = False) -> Any:
        if not isinstance(other, int) or isinstance(other, bool):
            if isinstance(other, float):
                self.watcher.real.append(self)
            return NotImplemented
        left, right = (other, self) if swapped else (self, other)
        return TracedInt(function(int(left), int(right)), Expression(function, left, right), self.watcher)

    def __add__(self, other: Any) -> Any:
        return self._combine(other, int.__add__)

    def __radd__(self, other: Any) -> Any:
        return self._combine(other, int.__add__, swapped=True)

    def __sub__(self, other: Any) -> Any:
        return self._combine(other, int.__sub__)

    def __rsub__(self, other: Any) -> Any:
        return self._combine(other, int.__sub__, swapped=True)

    def __mul__(self, other: Any) -> Any:
        return self._combine(other, int.__mul__)

    def __rmul__(self, other: Any) -> Any:
        return self._combine(other, int.__mul__, swapped=True)

    def __floordiv__(self, other: Any) -> Any:
        return self._combine(other, int.__floordiv__)

    def __rfloordiv__(self, other: Any) -> Any:
        return self._combine(other, int.__floordiv__, swapped=True)

    def __mod__(self, other: Any) -> Any:
        return self._combine(other, int.__mod__)

    def __neg__(self) -> Any:
        return self._combine(0, int.__sub__, swapped=True)

    def __truediv__(self, other: Any) -> Any:
        self.watcher.real.append(self)
        return int(self) / other

    def __rtruediv__(self, other: Any) -> Any:
        self.watcher.real.append(self)
        return other / int(self)

    def __pow__(self, other: Any, modulus: Any = None) -> Any:
        self.watcher.real.append(self)
        return pow(int(self), other, modulus)

    def __rpow__(self, other: Any, modulus: Any = None) -> Any:
        self.watcher.real.append(self)
        return pow(other, int(self), modulus)

    def __float__(self) -> float:
        self.watcher.real.append(self)
        return float(int(self))

    def __int__(self) -> int:
        return int.__int__(self)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **settings: Any) -> Any:
        self.watcher.real.append(self)  # numpy.sqrt(width)
        return getattr(ufunc, method)(*(int(x) if isinstance(x, TracedInt) else x for x in inputs), **settings)

    def __eq__(self, other: object) -> bool:
        equal = int.__eq__(self, other)  # type: ignore[operator]
        if equal is True and isinstance(other, TracedInt):
            self.watcher.equal.append((self, other))
        return equal

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__

    def __copy__(self) -> int:
        return int(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return int(self)  # a copy of the model made during the pass must not keep traced integers

    def __reduce__(self) -> tuple[Any, ...]:
        return (int, (int(self),))


def origins(value: Any) -> Iterator[Index | AttributeKey]:
    """The axes and attributes that an integer was computed from."""
    if isinstance(value, TracedInt):
        if isinstance(value.origin, Expression):
            yield from origins(value.origin.left)
            yield from origins(value.origin.right)
        else:
            yield value.origin


def evaluate(value: int, attribute: Callable[[AttributeKey, int], int], size: Callable[[Index], int]) -> int:
    """The value an integer would have for other sizes; plain integers are constants."""
    if not isinstance(value, TracedInt):
        return int(value)
    origin = value.origin
    if isinstance(origin, Index):
        return size(origin)
    if isinstance(origin, AttributeKey):
        return attribute(origin, int(value))
    return origin.function(evaluate(origin.left, attribute, size), evaluate(origin.right, attribute, size))


_LOGARITHMS = ("log", "log2", "log10", "isqrt")  # these read an int without asking it


@contextmanager
def watched_logarithms() -> Iterator[None]:
    """Let ``math.log`` and its kin report traced integers, as ``math.sqrt`` does through ``__float__``."""
    originals = {name: getattr(math, name) for name in _LOGARITHMS}

    def reporting(original: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any) -> Any:
            for value in args:
                if isinstance(value, TracedInt):
                    value.watcher.real.append(value)
            return original(*args)

        return function

    try:
        for name, original in originals.items():
            setattr(math, name, reporting(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(math, name, original)


@contextmanager
def traced_attributes(model: nn.Module, watcher: Watcher) -> Iterator[None]:
    """Replace the width attributes of every module by traced integers; everything is put back at the end."""
    replaced: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for path, module in model.named_modules():
            for name, value in list(vars(module).items()):
                if name not in SIZE_ATTRIBUTES:
                    continue
                if isinstance(value, int) and not isinstance(value, bool):
                    traced: Any = TracedInt(value, AttributeKey(path, name, None), watcher)
                elif type(value) in (tuple, list) and value and all(type(item) is int for item in value):
                    items = (TracedInt(item, AttributeKey(path, name, i), watcher) for i, item in enumerate(value))
                    traced = type(value)(items)
                else:
                    continue
                replaced.append((vars(module), name, value))
                vars(module)[name] = traced
        yield
    finally:
        for namespace, name, value in replaced:
            namespace[name] = value
