"""Integers that remember where they came from.

``x.view(batch, tokens, self.head_dim)`` says which attribute must change with an axis, but only to somebody who can see
that the third integer was read from ``head_dim``. While a forward pass is watched, the width attributes of all modules
are :class:`TracedInt`, as are the items of every ``tensor.shape``; arithmetic on them builds an expression, and a use as
a real number is noted. Powers of sizes (``1 / sqrt(head_dim)``) are :class:`TracedFloat`, so that surgery can make up for
their change (see ``scaling.py``). One thing cannot be seen: a float that comes first in an operation with an int
(``0.5 * width``) computes with it without asking it.
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
        self.floats: list[TracedFloat] = []


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
            if isinstance(other, float) and function is int.__mul__:
                if isinstance(other, TracedFloat):
                    return NotImplemented  # it does the same
                return TracedFloat(int(self), ((self, 1.0),), self.watcher) * other
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
        return TracedFloat(int(self), ((self, 1.0),), self.watcher) / other

    def __rtruediv__(self, other: Any) -> Any:
        return other / TracedFloat(int(self), ((self, 1.0),), self.watcher)

    def __pow__(self, other: Any, modulus: Any = None) -> Any:
        if modulus is None and type(other) is int and other >= 0:
            return self._combine(other, int.__pow__)
        if modulus is None and type(other) in (int, float):
            return TracedFloat(int(self), ((self, 1.0),), self.watcher) ** other
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


Powers = tuple[tuple[TracedInt, float], ...]


class TracedFloat(float):
    """A number times powers of traced integers, such as ``head_dim ** -0.5``.

    ``powers``: pairs of an integer and its exponent; the number itself does not matter, for only the ratio of two sizes
    is asked for. ``is_followed`` tells whether the float went into another one or into a tensor whose values it scales;
    the sizes behind a float that was used in any other way count as used as real numbers.
    """

    powers: Powers
    watcher: Watcher
    is_followed: bool

    def __new__(cls, value: float, powers: Powers, watcher: Watcher) -> TracedFloat:
        self = super().__new__(cls, value)
        self.powers = powers
        self.watcher = watcher
        self.is_followed = False
        watcher.floats.append(self)
        return self

    def give_up(self) -> float:
        """Say that the float was used in a way that is not followed; returns it as a plain number."""
        self.watcher.real += [size for size, _ in self.powers]
        return float.__add__(self, 0.0)

    def _derive(self, value: float, powers: Powers) -> TracedFloat:
        self.is_followed = True
        return TracedFloat(value, powers, self.watcher)

    def _times(self, other: Any, exponent: float, value: Callable[[float, float], float]) -> Any:
        """The product of this float and a power of another number."""
        powers = self.powers
        if isinstance(other, TracedFloat):
            other.is_followed = True
            powers += tuple((size, exponent * power) for size, power in other.powers)
        elif isinstance(other, TracedInt):
            powers += ((other, exponent),)
        elif not isinstance(other, (int, float)):
            return NotImplemented
        return self._derive(value(plain(self), plain(other)), powers)

    def __mul__(self, other: Any) -> Any:
        return self._times(other, 1.0, float.__mul__)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        return self._times(other, -1.0, float.__truediv__)

    def __rtruediv__(self, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        return (self**-1.0) * other

    def __pow__(self, other: Any, modulus: Any = None) -> Any:
        if modulus is not None or type(other) not in (int, float):
            return pow(self.give_up(), other)
        return self._derive(plain(self) ** other, tuple((size, power * other) for size, power in self.powers))

    def __neg__(self) -> TracedFloat:
        return self._derive(-plain(self), self.powers)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **settings: Any) -> Any:
        for value in inputs:
            if isinstance(value, (TracedInt, TracedFloat)):
                value.give_up() if isinstance(value, TracedFloat) else value.watcher.real.append(value)
        return getattr(ufunc, method)(*(plain(x) if isinstance(x, (int, float)) else x for x in inputs), **settings)

    def __copy__(self) -> float:
        return plain(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> float:
        return plain(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return (float, (plain(self),))


def _giving_up(name: str) -> Callable[..., Any]:
    original = getattr(float, name)

    def method(self: TracedFloat, *others: Any) -> Any:
        self.give_up()
        return original(self, *(plain(x) if isinstance(x, (TracedInt, TracedFloat)) else x for x in others))

    return method


for (
    _name
) in """__add__ __radd__ __sub__ __rsub__ __rpow__ __floordiv__ __rfloordiv__ __mod__ __rmod__ __divmod__ __rdivmod__
        __abs__ __int__ __trunc__ __floor__ __ceil__ __round__ __float__ is_integer as_integer_ratio""".split():
    setattr(TracedFloat, _name, _giving_up(_name))


def plain(value: Any) -> float:
    """A float without a history."""
    return float.__add__(value, 0.0) if isinstance(value, float) else float(int(value))


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


@contextmanager
def watched_mathematics() -> Iterator[None]:
    """Let the functions of ``math`` see traced numbers; those other than ``sqrt`` use them in a way that is not followed."""
    originals = {name: value for name, value in vars(math).items() if callable(value)}

    def reporting(original: Callable[..., Any]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            for value in args:
                if isinstance(value, TracedFloat):
                    value.give_up()
                elif isinstance(value, TracedInt):
                    value.watcher.real.append(value)
            return original(*args, **kwargs)

        return function

    def sqrt(value: Any) -> Any:
        return value**0.5 if isinstance(value, (TracedInt, TracedFloat)) else originals["sqrt"](value)

    whole = ("gcd", "lcm", "prod", "ceil", "floor", "trunc")  # of ints, or asking the number itself
    try:
        for name, original in originals.items():
            if name not in whole:
                setattr(math, name, reporting(original))
        math.sqrt = sqrt  # type: ignore[assignment]
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
