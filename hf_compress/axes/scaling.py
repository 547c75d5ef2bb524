"""Factors that change with a size, and the layers that can absorb their change.

Many attentions divide by ``sqrt(head_dim)`` at run time, so that removing dimensions of a head changes the divisor of
those that stay. Nothing is lost if the layer that makes the query is multiplied by the inverse of that change. While a
forward pass is watched, every layer with its own weight and bias starts a :class:`Gain`: multiplying its parameters for an
output channel by a positive number multiplies the tensor by that number there. The gain follows the tensor through
whatever keeps this true (layout, sums, rotations, the product with another tensor) and collects the size-dependent factors
on the way; where it ends, the tensor was *used*. A channel all of whose uses carry the same factor F can be multiplied by
F(old sizes) / F(new sizes), and the factor's change is made up for. Which channels a tensor shows is only worked out for
layers whose tensors met a factor: the layout is then repeated on channel numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .algebra import Index, find
from .provenance import AttributeKey, Powers, TracedFloat, TracedInt, Watcher

_ELEMENTWISE = frozenset(
    """
    to type float double half bfloat16 type_as contiguous clone detach data.__get__ cpu cuda identity positive neg negative
    relu abs leaky_relu dropout dropout1d dropout2d dropout3d feature_dropout
    """.split()
)
_POOLING = frozenset(
    """
    sum mean amax amin expand repeat broadcast_to roll flip max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d interpolate
    """.split()
)
_SUMS = frozenset("add sub subtract rsub cat concat concatenate stack".split())
_PRODUCTS = frozenset("mul multiply matmul bmm mm einsum".split())
_QUOTIENTS = frozenset("div divide true_divide truediv".split())
BY_A_NUMBER = _QUOTIENTS | {"mul", "multiply"}
_LAYERS = {"linear": ("weight", "bias", 0), "addmm": ("mat2", "input", 1), "batch_norm": ("weight", "bias", 0)}
_LAYERS |= {f"conv{n}d": ("weight", "bias", 0) for n in (1, 2, 3)}
"""Layers: the arguments that hold weight and bias, and the dimension of the weight that counts output channels."""


@dataclass(eq=False)
class Source:
    """One call of a layer: channel c belongs to index c along the given dimension of each of its parameters."""

    parameters: tuple[tuple[str, int], ...]
    uses: list[Gain] = field(default_factory=list)


@dataclass(eq=False)
class Gain:
    """What multiplying a source's channels does to one tensor, and the factors that the tensor was multiplied by.

    ``layout`` makes this tensor's channel numbers out of those of its only parent, or out of nothing at the source;
    without it the tensor mixes the channels of all of its parents.
    """

    source: Source
    parents: tuple[Gain, ...] = ()
    layout: Callable[..., Tensor] | None = None
    factors: Powers = ()

    def channels(self) -> Tensor:
        """Which channels have a part in the tensor: int64, laid out as the tensor or, where they mix, flat."""
        parents = [parent.channels() for parent in self.parents]
        is_mixed = any(channels.dim() == 1 for channels in parents)
        if self.layout is not None and not is_mixed:
            try:
                shown = self.layout(*parents)
                if shown.dim() != 1:
                    return shown
                parents = [shown]
            except (RuntimeError, TypeError, IndexError, ValueError):
                pass  # a layout that channel numbers cannot follow: all channels are taken to have a part
        return torch.cat([_distinct(channels) for channels in parents]).unique()


class Absorbed(NamedTuple):
    """Channels of a parameter's dimension whose every use is multiplied by the same factor."""

    parameter: str
    dim: int
    channels: Tensor
    factor: Powers


class Gains:
    """The gains of one watched forward pass."""

    def __init__(self, watcher: Watcher):
        self.watcher = watcher
        self.sources: list[Source] = []

    def use(self, *gains: Gain | None) -> None:
        """Say that tensors were used in a way that is not followed further."""
        for gain in gains:
            if gain is not None:
                gain.source.uses.append(gain)

    def begin(self, parameters: Sequence[tuple[str, int]], count: int, shape: Sequence[int], position: int) -> Gain:
        """The gain of a layer's output of a shape, with its ``count`` channels along ``position``."""

        def layout() -> Tensor:
            column = [1] * len(shape)
            column[position] = count
            return torch.arange(count).view(column).expand(tuple(shape))

        source = Source(tuple(parameters))
        self.sources.append(source)
        return Gain(source, (), layout)

    def follow(
        self,
        name: str,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        gains: Sequence[Gain | None],
        is_layout: bool,
        outputs: int,
    ) -> list[Gain | None]:
        """The gains of a call's outputs, from those of its tensor arguments; what is not followed counts as used."""
        given = [gain for gain in gains if gain is not None]
        first = given[0]
        if kwargs.get("rounding_mode") is not None:
            self.use(*given)
            return []
        alone = len(gains) == 1
        if name in _ELEMENTWISE or (name in BY_A_NUMBER and alone):
            powers: Powers = ()
            if name in BY_A_NUMBER:
                number = next((item for item in args if isinstance(item, (int, float))), None)
                number = kwargs.get("other", number)
                if name in _QUOTIENTS and args and args[0] is number:
                    self.use(first)
                    return []
                sign = -1.0 if name in _QUOTIENTS else 1.0
                powers = tuple((size, sign * power) for size, power in powers_of(number))
            if gains[0] is None:
                self.use(*given)
                return []
            self.use(*given[1:])
            return [Gain(first.source, (first,), _itself, first.factors + powers)]
        if is_layout and alone and args and isinstance(args[0], Tensor):
            return [
                Gain(first.source, (first,), _replay(name, function, args[1:], kwargs, place), first.factors)
                for place in range(outputs)
            ]
        if name in _POOLING and alone:
            return [Gain(first.source, (first,), None, first.factors)]
        if name in _SUMS and len(given) == len(gains) > 1:
            if len({(gain.source, signature(gain.factors)) for gain in given}) == 1:
                return [Gain(first.source, tuple(given), None, first.factors)]
        elif (name in _PRODUCTS) or (name in _QUOTIENTS and gains[0] is not None):
            self.use(*given[1:])
            return [Gain(first.source, (first,), None, first.factors)]
        self.use(*given)
        return []

    def attend(
        self, query: Gain | None, key: Gain | None, *others: Gain | None, factor: Powers | None, scale: Any
    ) -> None:
        """Fused attention: the scale multiplies the query (or the key, where no layer stands behind the query).

        Args:
            factor: of the scale that the operator chooses itself.
            scale: the one that it was given otherwise.
        """
        scaled, other = (query, key) if query is not None else (key, None)
        if scaled is not None:
            powers = powers_of(scale) if factor is None else factor
            scaled = Gain(scaled.source, (scaled,), _itself, scaled.factors + powers)
        elif factor is not None or isinstance(scale, TracedInt):
            self.watcher.real += [size for size, _ in factor or ((scale, 1.0),)]
        self.use(scaled, other, *others)

    def absorbed(self, readers: Callable[[str], int]) -> Iterator[Absorbed]:
        """Which parameters can absorb which factors; the sizes in all others count as used as real numbers.

        Args:
            readers: how often a parameter was read during the pass.
        """
        for number in self.watcher.floats:
            if not number.is_followed:
                number.give_up()
        sharing: dict[str, list[Source]] = {}
        for source in self.sources:
            for parameter, _ in source.parameters:
                sharing.setdefault(parameter, []).append(source)
        done: set[tuple[tuple[str, int], ...]] = set()
        for source in self.sources:
            if source.parameters in done or not any(use.factors for use in source.uses):
                continue
            done.add(source.parameters)
            calls = sharing[source.parameters[0][0]]
            met: dict[int, dict[Any, Powers]] = {}
            for call in calls:
                for use in call.uses:
                    for channel in _distinct(use.channels()).tolist():
                        met.setdefault(channel, {})[signature(use.factors)] = use.factors
            is_clear = all(
                len(sharing[parameter]) == readers(parameter)
                and all(call.parameters == source.parameters for call in sharing[parameter])
                for parameter, _ in source.parameters
            )
            together: dict[Any, tuple[Powers, list[int]]] = {}
            for channel, factors in met.items():
                for sign, powers in factors.items():
                    if sign and is_clear and len(factors) == 1:
                        together.setdefault(sign, (powers, []))[1].append(channel)
                    else:
                        self.watcher.real += [size for size, _ in powers]
            for powers, channels in together.values():
                for parameter, dim in source.parameters:
                    yield Absorbed(parameter, dim, torch.tensor(sorted(channels)), powers)


def powers_of(number: Any) -> Powers:
    """The powers of sizes in a number that multiplies a tensor, which is followed from now on."""
    if isinstance(number, TracedInt):
        return ((number, 1.0),)
    if isinstance(number, TracedFloat):
        number.is_followed = True
        return number.powers
    return ()


def signature(factors: Powers) -> frozenset[tuple[Any, float]]:
    """The same for equal factors, however they were computed."""
    total: dict[Any, float] = {}
    for size, power in factors:
        key = _origin(size)
        total[key] = round(total.get(key, 0.0) + power, 9)
    return frozenset((key, power) for key, power in total.items() if power)


def _origin(value: Any) -> Any:
    if not isinstance(value, TracedInt):
        return int(value)
    origin = value.origin
    if isinstance(origin, Index):
        return find(origin)
    if isinstance(origin, AttributeKey):
        return origin
    return origin.function, _origin(origin.left), _origin(origin.right)


def _distinct(channels: Tensor) -> Tensor:
    """Every number that occurs, sorted."""
    once = channels[tuple(0 if step == 0 else slice(None) for step in channels.stride())]  # expanded dimensions repeat
    return once.unique()


def _itself(channels: Tensor) -> Tensor:
    return channels


def _replay(
    name: str, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], place: int
) -> Callable[[Tensor], Tensor]:
    """Repeat an operator on channel numbers."""

    def layout(channels: Tensor) -> Tensor:
        repeated = torch.reshape if name == "view" else function
        shape = (tuple(args),) if name == "view" and args and isinstance(args[0], int) else tuple(args)
        made = repeated(channels, *shape, **kwargs)
        return made if isinstance(made, Tensor) else made[place]

    return layout
