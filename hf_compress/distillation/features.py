"""Which features of student and teacher are compared, and how maps of any kind become equally many pixels.

A feature is an entry of a model's ``hidden_states`` (an integer) or the output of a module (its name). Maps [batch,
channels, height, width], maps with channels last, and tokens [batch, n, channels] with or without class tokens in front
all become [batch, pixels, channels].
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.errors import MethodError, ModelError

from .losses import as_wide

Feature = int | str
Pair = tuple[Feature, Feature]

_MOST_FEATURES = 4  # that are chosen when none are named
_MOST_CLASS_TOKENS = 8  # a class token, one for distillation, four or five registers
_SHOWN = 24
RESIZINGS = ("pool", "interpolate")


def pairs_from(features: Any) -> list[Pair] | None:
    """Features as (student's, teacher's), from what a user gives.

    Args:
        features: None; names or numbers, each for both models; or pairs of them. Lists stand for pairs too.

    Raises:
        MethodError: for anything else.
    """
    if features is None:
        return None
    wanted = "give integers (of hidden_states), names of modules, or pairs (student's, teacher's) of them"
    if isinstance(features, (int, str)) and not isinstance(features, bool):
        features = [features]
    if not isinstance(features, Iterable):
        raise MethodError(f"features={features!r} is not possible: {wanted}.")
    found: list[Pair] = []
    for item in features:
        pair = tuple(item) if isinstance(item, (list, tuple)) else (item, item)
        if len(pair) != 2 or any(isinstance(part, bool) or not isinstance(part, (int, str)) for part in pair):
            raise MethodError(f"the feature {item!r} is not possible: {wanted}.")
        found.append(pair)
    if not found:
        raise MethodError(f"features={features!r} names none: {wanted}; or leave it out, or set affinity_weight=0.")
    return found


def run(
    model: nn.Module, features: Sequence[Feature], whose: str, pixel_values: Tensor, **inputs: Any
) -> tuple[Any, list[Tensor]]:
    """Run a model once, and hand over the features beside what it returns.

    Args:
        model: a model of transformers.
        features: numbers or names.
        whose: "student" or "teacher", for messages.

    Returns:
        the output without its hidden states, and one tensor for each feature.

    Raises:
        ModelError: when the model gives no hidden states, or too few.
        MethodError: when a module does not exist, does not run, or returns no tensor; the message lists those that do.
    """
    modules = {name for name in features if isinstance(name, str)}
    numbers = any(not isinstance(name, str) for name in features)
    with _watched(model, modules, whose) as seen:
        outputs = model(pixel_values, **inputs, **({"output_hidden_states": True} if numbers else {}))
    states: Any = getattr(outputs, "hidden_states", None) if numbers else None
    taken = []
    for feature in features:
        if isinstance(feature, str):
            tensor = _tensor_in(seen.get(feature))
            if tensor is None:
                what = "was not run" if feature not in seen else f"returns {type(seen[feature]).__name__}, not a map"
                raise MethodError(
                    f"the {whose}'s module {feature!r} {what}. {_listed(model, whose, pixel_values, inputs)}"
                )
            taken.append(tensor)
            continue
        if states is None:
            raise ModelError(
                f"the {whose} {type(model).__name__} gives no hidden_states. Name modules in features=. "
                f"{_listed(model, whose, pixel_values, inputs)}"
            )
        if not -len(states) <= feature < len(states):
            raise MethodError(
                f"the {whose} {type(model).__name__} has {len(states)} hidden_states, numbered from 0; there is no {feature}."
            )
        taken.append(states[feature])
    return _without_states(outputs) if numbers else outputs, taken


@contextmanager
def _watched(model: nn.Module, names: Iterable[str], whose: str) -> Iterator[dict[str, Any]]:
    """What the named modules return, from hooks that last as long as the block."""
    seen: dict[str, Any] = {}
    handles = []
    try:
        for name in names:
            try:
                module = model.get_submodule(name)
            except AttributeError:
                known = [path for path, _ in model.named_modules() if path]
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                shown = sorted(known, key=lambda path: (path.count("."), known.index(path)))[:_SHOWN]
                more = f" and {len(known) - len(shown)} inside them" if len(known) > len(shown) else ""
                raise MethodError(
                    f"the {whose} {type(model).__name__} has no module {name!r}.{hint} It has {', '.join(shown)}{more}."
                ) from None

            def keep(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                seen[name] = output

            handles.append(module.register_forward_hook(keep))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _tensor_in(output: Any) -> Tensor | None:
    """The feature map that a module returned: itself, or the first part of a tuple or an output object."""
    if isinstance(output, Tensor):
        return output if output.dim() in (3, 4) and output.is_floating_point() else None
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return _tensor_in(output[0]) if isinstance(output, (tuple, list)) and output else None


def _listed(model: nn.Module, whose: str, pixel_values: Tensor, inputs: dict[str, Any]) -> str:
    """A sentence with the modules that return feature maps, the outer ones first."""
    names = [name for name, _ in model.named_modules() if name]
    try:
        with _watched(model, names, whose) as seen, torch.no_grad():
            model(pixel_values, **inputs)
    except Exception:  # whatever it is, it is not what the user is to be told now
        return ""
    usable = sorted(
        (n for n in names if _tensor_in(seen.get(n)) is not None), key=lambda n: (n.count("."), names.index(n))
    )
    more = f" and {len(usable) - _SHOWN} more" if len(usable) > _SHOWN else ""
    return f"Modules of it that return feature maps: {', '.join(usable[:_SHOWN])}{more}." if usable else ""


def _without_states(outputs: Any) -> Any:
    """The output that the model gives when nobody asks for its hidden states."""
    kept = {name: value for name, value in outputs.items() if name not in ("hidden_states", "reshaped_hidden_states")}
    return type(outputs)(**kept)


def chosen(student: int, teacher: int) -> list[Pair]:
    """Pairs of hidden states at the same relative depth, the last ones among them; four at most.

    Args:
        student, teacher: how many hidden states there are; the first is the embedding, which is left out.
    """
    count = min(student - 1, teacher - 1, _MOST_FEATURES)
    return [(round(i * (student - 1) / count), round(i * (teacher - 1) / count)) for i in range(1, count + 1)]


# -- maps and tokens ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pixels:
    """A feature as tokens [batch, n, channels]; the last height x width of them lie on a grid, where that is known."""

    tokens: Tensor
    grid: tuple[int, int] | None

    @property
    def on_grid(self) -> Tensor:
        assert self.grid is not None
        return self.tokens[:, self.tokens.shape[1] - self.grid[0] * self.grid[1] :]

    def resized(self, size: tuple[int, int], resizing: str) -> Tensor:
        assert self.grid is not None
        if self.grid == size:
            return self.on_grid
        maps = as_wide(self.on_grid).mT.unflatten(2, self.grid)
        if resizing == "interpolate":
            maps = F.interpolate(maps, size, mode="bilinear", align_corners=True)
        else:
            factors = [before // after for before, after in zip(self.grid, size, strict=True)]
            is_even = [size[i] * factors[i] for i in (0, 1)] == list(self.grid)
            maps = F.avg_pool2d(maps, factors) if is_even else F.adaptive_avg_pool2d(maps, size)
        return maps.flatten(2).mT


def as_pixels(feature: Tensor, image: tuple[int, int]) -> _Pixels:
    """A feature as tokens, with the grid that they lie on.

    Of four dimensions the second counts channels, unless the second and third alone could be those of the image. Of three
    the second counts tokens, with as few class tokens in front as leave a grid of the image's proportions.

    Args:
        feature: [batch, channels, height, width], [batch, height, width, channels] or [batch, n, channels].
        image: height and width.
    """
    if feature.dim() == 4:
        first, second, third = feature.shape[1:]
        is_last = first * image[1] == second * image[0] and second * image[1] != third * image[0]
        maps = feature if is_last else feature.permute(0, 2, 3, 1)
        return _Pixels(maps.flatten(1, 2), (maps.shape[1], maps.shape[2]))
    count = feature.shape[1]
    for extra in range(min(_MOST_CLASS_TOKENS, count - 1) + 1):
        height = round(((count - extra) * image[0] / image[1]) ** 0.5)
        if height and (count - extra) % height == 0 and height * image[1] == (count - extra) // height * image[0]:
            return _Pixels(feature, (height, (count - extra) // height))
    return _Pixels(feature, None)


def matched(
    student: Tensor, teacher: Tensor, image: tuple[int, int], resizing: str, names: Pair
) -> tuple[Tensor, Tensor]:
    """Both features as [batch, pixels, channels] with equally many pixels.

    Args:
        student, teacher: as for :func:`as_pixels`.
        image: height and width of the images.
        resizing: where the sizes differ: ``pool`` averages the larger one down to the smaller; ``interpolate`` brings the
            teacher's to the student's size by bilinear interpolation with aligned corners, as the paper's code does.
        names: of the features, for messages.

    Raises:
        MethodError: when the numbers of tokens differ and at least one is no grid that could be resized.
    """
    ours, theirs = as_pixels(student, image), as_pixels(teacher, image)
    if student.dim() == teacher.dim() == 3 and ours.tokens.shape[1] == theirs.tokens.shape[1]:
        return ours.tokens, theirs.tokens
    if ours.grid is None or theirs.grid is None:
        whose, feature = ("student", ours) if ours.grid is None else ("teacher", theirs)
        raise MethodError(
            f"features {names[0]!r} (student, {_described(ours)}) and {names[1]!r} (teacher, {_described(theirs)}) cannot be "
            f"matched: the {feature.tokens.shape[1]} tokens of the {whose} are no grid of an image of {image[0]}x{image[1]} "
            f"with up to {_MOST_CLASS_TOKENS} class tokens in front. Choose other features, with as many tokens as each other."
        )
    size = ours.grid
    if resizing == "pool":
        size = (min(ours.grid[0], theirs.grid[0]), min(ours.grid[1], theirs.grid[1]))
    return ours.resized(size, resizing), theirs.resized(size, resizing)


def _described(feature: _Pixels) -> str:
    count = f"{feature.tokens.shape[1]} tokens"
    return count if feature.grid is None else f"{count} on {feature.grid[0]}x{feature.grid[1]}"
