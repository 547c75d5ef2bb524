"""The record: how a model differs from the one that its configuration class builds, as plain JSON.

``{"version": 1, "shapes": {tensor: "64x-"}, "attributes": {module: {name: int | [ints]}}, "biases": [modules]}``

and, where whole blocks are gone, ``"version": 2`` and ``"removed": {list of modules: [positions]}``, and, where layers
are in two factors, ``"version": 3`` and ``"factorized": {module: {"scheme": name, "rank": int}}``, and, where filters
stand in place of attention, ``"version": 4`` and ``"filtered": {module: {"filter": name, "grid": [int, int], "prefix":
int}}``. ``removed`` speaks of the model as its configuration builds it, so that no entry depends on another; all other
fields speak of the model after these removals, and so name modules as the checkpoint does. ``filtered`` speaks of
attention in the size that the configuration builds, ``factorized`` of layers in that size, those of filters too; the
three fields that follow speak of the model with its filters and factors.

A record is read from checkpoints of unknown origin, so it is data and nothing else. Its strings are looked up among the
tensors and modules that exist and in the closed vocabulary :data:`~hf_compress.axes.attributes.SIZE_ATTRIBUTES`; its
numbers may only make things smaller. All of it is checked before the first tensor is allocated or attribute set.
"""

from __future__ import annotations

import functools
import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from hf_compress.axes.attributes import SIZE_ATTRIBUTES
from hf_compress.errors import ModelError, RecordError

from .decomposition import DECOMPOSABLE, SCHEMES, Scheme, can_decompose, full_rank
from .factorized import factorized_shell
from .filtered import FILTERS, LONGEST_SIDE, MOST_PREFIX_TOKENS, Filter, filtered_shell, is_attention

RECORD_VERSION = (
    4  # 3 had no filters, 2 no factors, 1 no removed blocks; records are written in the oldest that can say them
)

_FIELDS = {
    1: ("version", "shapes", "attributes", "biases"),
    2: ("version", "removed", "shapes", "attributes", "biases"),
    3: ("version", "removed", "factorized", "shapes", "attributes", "biases"),
    4: ("version", "removed", "filtered", "factorized", "shapes", "attributes", "biases"),
}
_LONGEST_SHOWN = 60
_MOST_ENTRIES = 100_000  # of one field; the largest models of transformers have a few thousand tensors

Shape = tuple[int, ...]
PartialShape = tuple[int | None, ...]
"""A shape in which None stands for a dimension that is as the configuration builds it."""


@dataclass(frozen=True)
class Record:
    """How a model differs from the one that its configuration class builds.

    Args:
        shapes: name of a parameter or buffer -> its shape, with None for whole dimensions, so that a new classifier may
            have another number of classes. Only tensors whose shape differs, and of a standard layer only the weight:
            its bias, or a norm's statistics, follow (see :func:`followers`). Every alias of a shared tensor is listed.
        attributes: module -> attribute -> its value. Only what does not follow from the shapes.
        biases: linear layers and convolutions that were built without a bias and have one now.
        removed: ``nn.ModuleList`` or ``nn.Sequential`` -> positions of the entries that are gone, ascending; path and
            positions as the configuration builds them. The entries behind move up, in the model and in every name
            above.
        factorized: linear layers and convolutions that are in two factors -> scheme and rank (see
            :mod:`.decomposition`); of the layer as the configuration builds it. What has changed in size since is among
            the shapes, the rank too.
        filtered: attention blocks in whose place filters stand -> filter, its map's height and width in tokens, and the
            number of tokens before it (see :mod:`.filtered`).
    """

    shapes: Mapping[str, PartialShape] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, int | tuple[int, ...]]] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    removed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    factorized: Mapping[str, tuple[Scheme, int]] = field(default_factory=dict)
    filtered: Mapping[str, tuple[Filter, tuple[int, int], int]] = field(default_factory=dict)

    def __deepcopy__(self, memo: object) -> Record:
        return self  # nothing in a record ever changes, and transformers copies configurations often

    def __bool__(self) -> bool:
        return bool(self.shapes or self.attributes or self.biases or self.removed or self.factorized or self.filtered)

    @property
    def version(self) -> int:
        """Of the format: the oldest that can say this."""
        return 4 if self.filtered else 3 if self.factorized else 2 if self.removed else 1

    def merge(self, later: Record) -> Record:
        """This record followed by a later one, which speaks of the model that this one gives."""
        removed = {path: set(gone) for path, gone in self.removed.items()}
        for path, positions in later.removed.items():
            built = _as_built(path, self.removed)
            earlier = self.removed.get(built, ())
            removed.setdefault(built, set()).update(_position_as_built(position, earlier) for position in positions)
        gone = {path: tuple(sorted(positions)) for path, positions in removed.items()}
        # what was removed inside an entry that is now gone itself needs no mention
        gone = {path: positions for path, positions in sorted(gone.items()) if _renumbered(path, gone) is not None}
        if later.removed:
            self = Record(
                _renumbered_keys(self.shapes, later.removed),
                _renumbered_keys(self.attributes, later.removed),
                tuple(_renumbered_keys(dict.fromkeys(self.biases), later.removed)),
                factorized=_renumbered_keys(self.factorized, later.removed),
                filtered=_renumbered_keys(self.filtered, later.removed),
            )
        for path, (scheme, rank) in later.factorized.items():
            self = _in_factors(self, path, scheme, rank)
        attributes = {module: dict(values) for module, values in self.attributes.items()}
        for module, values in later.attributes.items():
            attributes.setdefault(module, {}).update(values)
        shapes = dict(self.shapes)
        for name, shape in later.shapes.items():
            before = shapes.get(name, shape)
            shapes[name] = tuple(new if new is not None else old for new, old in zip(shape, before, strict=True))
        biases = tuple(sorted({*self.biases, *later.biases}))
        factorized, filtered = {**self.factorized, **later.factorized}, {**self.filtered, **later.filtered}
        return Record(shapes, attributes, biases, gone, factorized, filtered)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON data."""
        filtered, factorized = sorted(self.filtered.items()), sorted(self.factorized.items())
        return {
            "version": self.version,
            **({"removed": {path: list(gone) for path, gone in self.removed.items()}} if self.removed else {}),
            **({"filtered": {path: _filter_json(*how) for path, how in filtered}} if filtered else {}),
            **({"factorized": {path: _factors_json(*how) for path, how in factorized}} if factorized else {}),
            "shapes": {name: _shape_text(shape) for name, shape in self.shapes.items()},
            "attributes": {
                module: {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
                for module, values in self.attributes.items()
            },
            "biases": list(self.biases),
        }

    @classmethod
    def from_json(cls, data: Any) -> Record:
        """Read and check JSON data that may be hostile.

        Raises:
            RecordError: naming the field that is not as it must be.
        """
        _check_mapping("record", data)
        version = data.get("version")
        if type(version) is not int or version < 1:
            _refuse("version", version, f"must be an integer from 1 to {RECORD_VERSION}")
        if version > RECORD_VERSION:
            raise RecordError(
                f"record.version: the checkpoint was written in record version {version}; this hf_compress reads up to "
                f"{RECORD_VERSION}. Upgrade hf_compress (pip install -U hf-compress)."
            )
        unknown = [key for key in data if key not in _FIELDS[version]]
        if unknown:
            _refuse(_shown(unknown[0]), "this field", f"is not known; the fields are {', '.join(_FIELDS[version])}")
        shapes: dict[str, PartialShape] = {}
        _check_mapping("shapes", data.get("shapes", {}))
        for name, shape in data.get("shapes", {}).items():
            sizes = _sizes_of_text(shape) if type(shape) is str else None
            if sizes is None or type(name) is not str or not any(sizes):  # words for it are made only where needed
                sizes = _explained_sizes(name, shape)
            shapes[name] = sizes
        attributes: dict[str, dict[str, int | Shape]] = {}
        _check_mapping("attributes", data.get("attributes", {}))
        for module, values in data.get("attributes", {}).items():
            place = f"attributes[{_shown(module)}]"
            _check_mapping(place, values)
            attributes[_name(place, module)] = checked = {}
            for name, value in values.items():
                here = f"{place}[{_shown(name)}]"
                if name not in SIZE_ATTRIBUTES:
                    _refuse(here, "this name", "is not an attribute that holds a size")
                checked[name] = _sizes(here, value) if type(value) is list else _size(here, value)
        biases = data.get("biases", [])
        if type(biases) is not list:
            _refuse("biases", biases, "must be a list of module names")
        if len(biases) > _MOST_ENTRIES:
            _refuse("biases", len(biases), f"entries are more than the {_MOST_ENTRIES} that any model needs")
        names = tuple(_name(f"biases[{i}]", name) for i, name in enumerate(biases))
        if len(set(names)) != len(names):
            _refuse("biases", "a name", "is listed twice")
        removed, factorized = _removed(data.get("removed", {})), _factorized(data.get("factorized", {}))
        return cls(shapes, attributes, names, removed, factorized, _filtered(data.get("filtered", {})))


# -- checks of single values --------------------------------------------------------------------------------------


def _shown(value: Any) -> str:
    """A short form of a value of any origin, made without walking through it."""
    if isinstance(value, str):
        return repr(value if len(value) <= _LONGEST_SHOWN else value[:_LONGEST_SHOWN] + "...")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**18:
        return "a huge integer"
    return repr(value) if value is None or isinstance(value, (bool, int, float)) else f"a {type(value).__name__}"


def _refuse(place: str, value: Any, why: str) -> NoReturn:
    said = value if value in ("this field", "this name", "a name") else f"{_shown(value)}"
    raise RecordError(
        f"record: {place}: {said} {why}. The quantization_config in config.json was not written by hf_compress for this "
        "model, or was changed since; save the checkpoint again."
    )


def _check_mapping(place: str, value: Any) -> None:
    if type(value) is not dict:
        _refuse(place, value, "must be a JSON object")
    if len(value) > _MOST_ENTRIES:
        _refuse(place, len(value), f"entries are more than the {_MOST_ENTRIES} that any model needs")


def _name(place: str, value: Any) -> str:
    if type(value) is not str:
        _refuse(place, value, "must be a name")
    return value


def _size(place: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        _refuse(place, value, "must be a positive integer")
    return value


def _sizes(place: str, value: list[Any], may_be_whole: bool = False) -> Any:
    if not value or len(value) > 16:
        _refuse(place, value, "must hold 1 to 16 sizes")
    return tuple(
        None if item is None and may_be_whole else _size(f"{place}[{i}]", item) for i, item in enumerate(value)
    )


_SHAPE_TEXT = re.compile(r"(?:[1-9][0-9]{0,17}|-)(?:x(?:[1-9][0-9]{0,17}|-)){0,15}", re.ASCII)
_LONGEST_SHAPE = 16 * 19


def _shape_text(shape: PartialShape) -> str:
    """``64x-x3x3``: one short string, since transformers parses, copies and logs a configuration several times a load."""
    return "x".join("-" if size is None else str(size) for size in shape)


def _sizes_of_text(text: str) -> PartialShape | None:
    if len(text) > _LONGEST_SHAPE or _SHAPE_TEXT.fullmatch(text) is None:
        return None
    return tuple(None if size == "-" else int(size) for size in text.split("x"))


def _explained_sizes(name: Any, shape: Any) -> PartialShape:
    """An entry of ``shapes`` that is not in the usual form: refused, or in lists, as early checkpoints have it."""
    place = f"shapes[{_shown(name)}]"
    _name(place, name)
    sizes: PartialShape | None = _sizes_of_text(shape) if type(shape) is str else None
    if type(shape) is list and shape:
        sizes = _sizes(place, shape, may_be_whole=True)
    if sizes is None:
        _refuse(place, shape, "must be 1 to 16 sizes with x between them, such as 64x-; - is a whole dimension")
    if not any(sizes):
        _refuse(place, "this field", "names no dimension that differs")
    return sizes


def _removed(value: Any) -> dict[str, tuple[int, ...]]:
    _check_mapping("removed", value)
    removed = {}
    for path, positions in value.items():
        place = f"removed[{_shown(path)}]"
        if type(positions) is not list or not 0 < len(positions) <= _MOST_ENTRIES:
            _refuse(place, positions, f"must be a list of 1 to {_MOST_ENTRIES} positions")
        for i, position in enumerate(positions):
            if type(position) is not int or position < 0:
                _refuse(f"{place}[{i}]", position, "must be a position, counted from 0")
            if i and position <= positions[i - 1]:
                _refuse(f"{place}[{i}]", position, "must be greater than the position before it")
        removed[_name(place, path)] = tuple(positions)
    return removed


def _factorized(value: Any) -> dict[str, tuple[Scheme, int]]:
    _check_mapping("factorized", value)
    factorized = {}
    for path, how in value.items():
        place = f"factorized[{_shown(path)}]"
        _check_mapping(place, how)
        if set(how) != {"scheme", "rank"}:
            _refuse(place, "this field", "must have exactly the entries 'scheme' and 'rank'")
        scheme = how["scheme"]
        if type(scheme) is not str or scheme not in SCHEMES:
            _refuse(f"{place}['scheme']", scheme, f"must be one of {', '.join(SCHEMES)}")
        factorized[_name(place, path)] = (scheme, _size(f"{place}['rank']", how["rank"]))
    return factorized


def _filtered(value: Any) -> dict[str, tuple[Filter, tuple[int, int], int]]:
    _check_mapping("filtered", value)
    filtered = {}
    for path, how in value.items():
        place = f"filtered[{_shown(path)}]"
        _check_mapping(place, how)
        if set(how) != {"filter", "grid", "prefix"}:
            _refuse(place, "this field", "must have exactly the entries 'filter', 'grid' and 'prefix'")
        kind, grid, prefix = how["filter"], how["grid"], how["prefix"]
        if type(kind) is not str or kind not in FILTERS:
            _refuse(f"{place}['filter']", kind, f"must be one of {', '.join(FILTERS)}")
        is_pair = type(grid) is list and len(grid) == 2
        if not is_pair or any(type(side) is not int or not 1 <= side <= LONGEST_SIDE for side in grid):
            _refuse(f"{place}['grid']", grid, f"must be a height and a width from 1 to {LONGEST_SIDE} tokens")
        if type(prefix) is not int or not 0 <= prefix <= MOST_PREFIX_TOKENS:
            _refuse(f"{place}['prefix']", prefix, f"must be a number of tokens from 0 to {MOST_PREFIX_TOKENS}")
        filtered[_name(place, path)] = (kind, (grid[0], grid[1]), prefix)
    return filtered


# -- removed entries ----------------------------------------------------------------------------------------------


def _renumbered(name: str, removed: Mapping[str, Sequence[int]]) -> str | None:
    """What a module or tensor is called once entries are removed; None when it is gone with them."""
    built = name.split(".")
    parts = list(built)
    for i, part in enumerate(built):
        gone = removed.get(".".join(built[:i]), ())
        if gone and part.isdecimal():
            position = int(part)
            if position in gone:
                return None
            parts[i] = str(position - bisect_left(gone, position))
    return ".".join(parts)


def _renumbered_keys(values: Mapping[str, Any], removed: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    names = {name: _renumbered(name, removed) for name in values}
    return {new: values[name] for name, new in names.items() if new is not None}


def _position_as_built(position: int, gone: Sequence[int]) -> int:
    for earlier in gone:  # ascending
        position += earlier <= position
    return position


def _as_built(name: str, removed: Mapping[str, Sequence[int]]) -> str:
    """The inverse of :func:`_renumbered`."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        gone = removed.get(".".join(parts[:i]), ())
        if gone and part.isdecimal():
            parts[i] = str(_position_as_built(int(part), gone))
    return ".".join(parts)


def is_numbered_list(module: nn.Module | None) -> bool:
    """Whether a module is a list whose entries are called 0, 1, 2, ..., so that names tell positions."""
    return isinstance(module, (nn.ModuleList, nn.Sequential)) and all(
        name == str(i) for i, name in enumerate(module._modules)
    )


Undo = list[tuple[nn.Module, dict[str, "nn.Module | None"]]]


def remove_entries(model: nn.Module, removed: Mapping[str, Sequence[int]]) -> Undo:
    """Take entries out of lists of modules, in place; those behind move up.

    Args:
        removed: list -> positions, both as they are before anything is removed.

    Returns:
        for :func:`restore_entries`.

    Raises:
        RecordError: when it does not fit the model, which is then unchanged.
    """
    modules = modules_by_path(model) if removed else {}
    gone_from: dict[int, str] = {}
    for path, positions in removed.items():
        place = f"removed[{_shown(path)}]"
        holder = modules.get(path)
        if not is_numbered_list(holder):
            _refuse(place, "a name", "of no list of modules of this architecture")
        size = len(holder._modules)  # type: ignore[union-attr]
        if positions[-1] >= size:
            _refuse(place, positions[-1], f"is out of range; the list has {size} entries, 0 to {size - 1}")
        if len(positions) >= size:
            _refuse(place, len(positions), f"entries are all that the list has; at least one of {size} must stay")
        if id(holder) in gone_from:
            _refuse(place, "a name", f"of the list that {gone_from[id(holder)]!r} names as well")
        gone_from[id(holder)] = path
    undo: Undo = []
    for path, positions in removed.items():
        entries = modules[path]._modules
        undo.append((modules[path], dict(entries)))
        gone = set(positions)
        kept = [entry for i, entry in enumerate(entries.values()) if i not in gone]
        entries.clear()
        entries.update({str(i): entry for i, entry in enumerate(kept)})
    return undo


def restore_entries(undo: Undo) -> None:
    """Put back what :func:`remove_entries` took."""
    for holder, entries in undo:
        holder._modules.clear()
        holder._modules.update(entries)


# -- layers in two factors ----------------------------------------------------------------------------------------


def _factors_json(scheme: Scheme, rank: int) -> dict[str, Any]:
    return {"scheme": scheme, "rank": rank}


def _filter_json(kind: Filter, grid: tuple[int, int], prefix: int) -> dict[str, Any]:
    return {"filter": kind, "grid": list(grid), "prefix": prefix}


def _in_factors(record: Record, path: str, scheme: Scheme, rank: int) -> Record:
    """A record that names a layer, as one that names its factors instead."""
    shapes, attributes = dict(record.shapes), dict(record.attributes)
    first, second = child_name(path, "first"), child_name(path, "second")
    out, inside, *kernel = shapes.pop(child_name(path, "weight"), (None, None))
    groups = attributes.pop(path, {}).get("groups")
    blocks = out if scheme == "decoupled" and kernel else groups  # of the second layer
    middle = blocks * rank if isinstance(blocks, int) else None
    found: dict[str, PartialShape] = {
        child_name(first, "weight"): (middle, inside, *kernel),
        child_name(second, "weight"): (out, None, *kernel),
    }
    if child_name(path, "bias") in shapes:
        found[child_name(second, "bias")] = shapes.pop(child_name(path, "bias"))
    shapes.update({name: shape for name, shape in found.items() if any(size is not None for size in shape)})
    counts = ((first, groups), (second, blocks))
    attributes.update({layer: {"groups": count} for layer, count in counts if isinstance(count, int)})
    biases = tuple(sorted(second if name == path else name for name in record.biases))
    return Record(shapes, attributes, biases, record.removed, record.factorized, record.filtered)


def _apply_factors(
    model: nn.Module, factorized: Mapping[str, tuple[Scheme, int]]
) -> tuple[Undo, dict[str, torch.device]]:
    """Put layers in two factors, whose weights are on the meta device; returns where those belong."""
    modules = modules_by_path(model) if factorized else {}
    paths = _names_of(modules)
    holders: dict[str, nn.Module] = {}
    for path, (scheme, rank) in factorized.items():
        place = f"factorized[{_shown(path)}]"
        layer = modules.get(path)
        if type(layer) not in DECOMPOSABLE or not path:
            _refuse(place, "a name", "of no plain linear layer or convolution of this architecture")
        assert layer is not None
        holders[path] = modules[path.rpartition(".")[0]]
        if paths[id(layer)] > 1 or paths[id(holders[path])] > 1:
            _refuse(place, "a name", "of a layer that is reached under another name as well")
        reason = can_decompose(layer, scheme)
        if reason:
            _refuse(place, "a name", f"of a layer that cannot be decomposed: {reason}")
        weight: Tensor = layer.weight  # type: ignore[assignment]
        highest = full_rank(weight.shape, scheme, getattr(layer, "groups", 1))
        if rank > highest:
            _refuse(f"{place}['rank']", rank, f"is more than the {highest} that the configuration's layer can have")
    undo: Undo = []
    devices = {}
    for path, (scheme, rank) in factorized.items():
        holder, name = holders[path], path.rpartition(".")[2]
        undo.append((holder, dict(holder._modules)))
        holder._modules[name] = shell = factorized_shell(modules[path], scheme, rank)
        weight = modules[path].weight  # type: ignore[assignment]
        devices[path] = weight.device
        for factor in (shell.first, shell.second):
            factor.weight.requires_grad_(weight.requires_grad)
    return undo, devices


def _names_of(modules: Mapping[str, nn.Module]) -> dict[int, int]:
    """Under how many names every module is reached, by its id."""
    paths: dict[int, int] = {}
    for module in modules.values():
        paths[id(module)] = paths.get(id(module), 0) + 1
    return paths


# -- filters in place of attention --------------------------------------------------------------------------------


def _apply_filters(
    model: nn.Module, filtered: Mapping[str, tuple[Filter, tuple[int, int], int]]
) -> tuple[Undo, dict[str, torch.device]]:
    """Put filters in place of attention, with weights on the meta device; returns where those belong."""
    modules = modules_by_path(model) if filtered else {}
    paths = _names_of(modules)
    for path in filtered:
        place = f"filtered[{_shown(path)}]"
        block = modules.get(path)
        if not path or not is_attention(block):
            _refuse(place, "a name", "of no plain attention block of this architecture")
        if paths[id(block)] > 1 or paths[id(modules[path.rpartition(".")[0]])] > 1:
            _refuse(place, "a name", "of a block that is reached under another name as well")
        if any(other != path and other.startswith(f"{path}.") for other in filtered):
            _refuse(place, "a name", "of a block that holds another one of this list")
    undo: Undo = []
    devices = {}
    for path, how in filtered.items():
        holder, block = modules[path.rpartition(".")[0]], modules[path]
        undo.append((holder, dict(holder._modules)))
        holder._modules[path.rpartition(".")[2]] = filtered_shell(block, *how)
        devices[path] = next(block.parameters()).device
    return undo, devices


# -- standard layers ----------------------------------------------------------------------------------------------


_Law = Callable[[Shape, int], dict[str, "int | Shape"]]


def _norm(weight: Shape, groups: int) -> dict[str, int | Shape]:
    return {"num_features": weight[0]}


_LAWS: tuple[tuple[type | tuple[type, ...], _Law], ...] = (
    (nn.modules.batchnorm._NormBase, _norm),
    (nn.Linear, lambda weight, groups: {"in_features": weight[1], "out_features": weight[0]}),
    (
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        lambda weight, groups: {"in_channels": weight[0], "out_channels": weight[1] * groups},
    ),
    (
        nn.modules.conv._ConvNd,
        lambda weight, groups: {"in_channels": weight[1] * groups, "out_channels": weight[0]},
    ),
    ((nn.LayerNorm, nn.RMSNorm), lambda weight, groups: {"normalized_shape": tuple(weight)}),
    (nn.GroupNorm, lambda weight, groups: {"num_channels": weight[0]}),
    (nn.Embedding, lambda weight, groups: {"num_embeddings": weight[0], "embedding_dim": weight[1]}),
)


@functools.cache
def _law_of(kind: type) -> _Law | None:
    """The law of a class of layers; kept, for a model has hundreds of layers of three or four classes."""
    for layers, law in _LAWS:
        if issubclass(kind, layers):
            return law
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    if conv1d is not None and issubclass(kind, conv1d):
        return lambda weight, groups: {"nx": weight[0], "nf": weight[1]}
    return None


def derived_attributes(module: nn.Module, shapes: Mapping[str, Shape], groups: int = 1) -> dict[str, int | Shape]:
    """Attributes of a standard layer that follow from the shapes of its own tensors.

    Args:
        module: any module; what is no standard layer gives an empty result.
        shapes: local name of a tensor ("weight") -> shape.
        groups: number of groups of a convolution.
    """
    kind: type = type(module)
    law = _law_of(kind)
    weight = shapes.get("weight") or (shapes.get("running_mean") if law is _norm else None)
    return law(weight, groups) if law is not None and weight else {}


_WITH_OPTIONAL_BIAS = (nn.Linear, nn.modules.conv._ConvNd)


_LENGTHS = ("out_features", "out_channels", "num_features", "num_channels", "nf", "normalized_shape")


def followers(shapes: Mapping[str, Shape], derived: Mapping[str, int | Shape]) -> dict[str, Shape]:
    """Shapes of those tensors of a standard layer that follow from its weight's: the bias, a norm's statistics.

    Args:
        shapes: local name of a tensor -> shape; without a weight nothing follows.
        derived: what :func:`derived_attributes` makes of them.
    """
    if "weight" not in shapes:
        return {}
    length = next((derived[name] for name in _LENGTHS if name in derived), None)
    if length is None:
        return {}
    whole = length if isinstance(length, tuple) else (length,)
    return {name: whole for name in ("bias", "running_mean", "running_var") if name in shapes}


def group_count(module: nn.Module) -> int | None:
    """Number of groups of a layer, 1 where it has none; None where a subclass uses the name for something else."""
    groups = vars(module).get("groups", 1)
    return groups if type(groups) is int else None


def without_followers(model: nn.Module, record: Record) -> Record:
    """The same record of a model without the entries that follow from others."""
    modules = modules_by_path(model)
    shapes = dict(record.shapes)
    for path in [path for path, _, own in (name.rpartition(".") for name in record.shapes) if own == "weight"]:
        own = local_shapes(modules[path])
        derived = derived_attributes(modules[path], own, group_count(modules[path]) or 1)
        for name, shape in followers(own, derived).items():
            if own[name] == shape:
                shapes.pop(child_name(path, name), None)
    return replace(record, shapes=shapes)


def local_shapes(module: nn.Module) -> dict[str, Shape]:
    """Local name -> shape of the tensors that a module holds itself."""
    own = [*module._parameters.items(), *module._buffers.items()]
    return {name: tuple(tensor.shape) for name, tensor in own if tensor is not None}


def derived_changes(
    module: nn.Module, was: Mapping[str, int | Shape], now: Mapping[str, int | Shape]
) -> dict[str, int | Shape]:
    """New values of the derived attributes of a module.

    An attribute counts as derived only where it agrees with the old shapes, so that a subclass that uses the name for
    something else is left alone.

    Args:
        module: whose attributes are still the old ones.
        was, now: what :func:`derived_attributes` makes of the old and of the new shapes.
    """
    held = vars(module)
    return {name: value for name, value in now.items() if _same(held.get(name), was.get(name))}


def _same(held: Any, law: Any) -> bool:
    return list(held) == list(law) if isinstance(held, (tuple, list)) and isinstance(law, tuple) else held == law


def child_name(path: str, name: str) -> str:
    """What a tensor or module is called that a module holds under ``name``."""
    return f"{path}.{name}" if path else name


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Every module under every name that it has, as ``named_modules(remove_duplicate=False)`` gives them.

    In a third of its time, which is what loading a small checkpoint is made of.
    """
    found: dict[str, nn.Module] = {}

    def collect(path: str, prefix: str, module: nn.Module) -> None:
        found[path] = module
        for name, child in module._modules.items():
            if child is not None:
                collect(prefix + name, f"{prefix}{name}.", child)

    collect("", "", model)
    return found


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under every name that it has."""
    return _tensors_of(modules_by_path(model))


def _tensors_of(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for path, module in modules.items():
        prefix = f"{path}." if path else ""
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    yield prefix + name, tensor


def replace_tensor(modules: Mapping[str, nn.Module], names: list[str], new: Tensor) -> None:
    """Put ``new`` where a parameter or buffer is, under all of its names; class and ``requires_grad`` are kept.

    A new object, not a new ``.data``: autograd remembers the shape of a parameter for as long as any graph that used it
    lives.

    Args:
        modules: path -> module, shared modules under every path.
        names: of one tensor.
    """
    # the stores themselves: what nn.Module's getattr and setattr come to for a tensor that is there, without their search
    places = []
    for full in names:
        path, _, name = full.rpartition(".")
        module = modules[path]
        store: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
        places.append((store, name))
    store, name = places[0]
    old = store[name]
    if type(old) is nn.Parameter:
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    elif isinstance(old, nn.Parameter):
        new = torch.Tensor._make_subclass(type(old), new, old.requires_grad)  # type: ignore[attr-defined]
    if isinstance(old, nn.Parameter) and old.__dict__:
        new.__dict__.update(old.__dict__)
    for store, name in places:
        store[name] = new


def with_item_type(old: Any, value: int | Shape) -> Any:
    """``value`` as the kind of sequence that the attribute held before."""
    return type(old)(value) if isinstance(old, (tuple, list)) and isinstance(value, tuple) else value


# -- applying -----------------------------------------------------------------------------------------------------


def apply_record(model: nn.Module, record: Record) -> nn.Module:
    """Make a freshly built model as small as the record says, in place; the values of resized tensors are undefined.

    Meant for a model on the meta device, where nothing is allocated; on any other device the resized tensors are
    allocated there, none larger than before, two factors at most twice what their layer had. A filter has at most
    three times the parameters of its attention block, and 90 numbers more for every channel.

    Args:
        model: what the configuration class builds.
        record: from :meth:`Record.from_json`, or from a model that was shrunk.

    Returns:
        ``model``.

    Raises:
        RecordError: when the record does not fit the model; the model is then unchanged.
    """
    undo = remove_entries(model, record.removed)
    try:
        undone, devices = _apply_filters(model, record.filtered)
        undo += undone
        undone, others = _apply_factors(model, record.factorized)
        undo += undone
        _apply_sizes(model, record)
    except BaseException:
        restore_entries(undo[::-1])
        raise
    for path, device in (devices | others).items():  # until here filters and factors took no memory
        for module in model.get_submodule(path).modules() if device.type != "meta" else ():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and parameter.is_meta:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                    setattr(module, name, nn.Parameter(empty, parameter.requires_grad))
    return model


class _Shapes(dict[str, Shape]):
    """Name of a tensor -> its shape in the resized model; asked of the tensor itself where nobody has set another."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__()
        self._tensors = tensors

    def __missing__(self, name: str) -> Shape:
        self[name] = shape = tuple(self._tensors[name].shape)
        return shape


def _apply_sizes(model: nn.Module, record: Record) -> None:
    modules = modules_by_path(model)
    tensors = dict(_tensors_of(modules))
    aliases: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        aliases.setdefault(id(tensor), []).append(name)

    def place(name: str) -> str:
        return f"shapes[{_shown(name)}]"

    for name, shape in record.shapes.items():
        if name not in tensors:
            _refuse(place(name), "a name", "of no parameter or buffer of this architecture")
        dense = tuple(tensors[name].shape)
        if len(shape) != len(dense):
            _refuse(place(name), len(shape), f"dimensions were given; this tensor has {len(dense)}")
        for dim, (size, most) in enumerate(zip(shape, dense, strict=True)):
            if size is not None and size > most:
                _refuse(f"{place(name)}[{dim}]", size, f"is more than the {most} that the configuration builds")
        for other in aliases[id(tensors[name])]:
            if record.shapes.get(other, shape) != shape:
                _refuse(place(name), "a name", f"of a tensor shared with {other!r}, which has another shape")

    new_shapes = _Shapes(tensors)
    for name, shape in record.shapes.items():
        whole = tuple(tensors[name].shape)
        for alias in aliases[id(tensors[name])]:
            new_shapes[alias] = tuple(w if size is None else size for size, w in zip(shape, whole, strict=True))

    settings = [setting for path, values in record.attributes.items() for setting in _settings(path, values, modules)]
    given = {(id(module), name): value for module, name, value in settings}
    for path in record.biases:
        _check_bias(path, modules, new_shapes)
    layers: dict[str, _Layer] = {}

    def layer(path: str) -> _Layer:
        if path not in layers:
            layers[path] = _Layer(path, modules[path], given)
        return layers[path]

    for name in list(new_shapes):
        path, _, own = name.rpartition(".")
        if own == "weight":
            for follower, length in layer(path).following(new_shapes[name]).items():
                if follower not in new_shapes:
                    for alias in aliases[id(tensors[follower])]:
                        new_shapes[alias] = length
    resized = {name for name, shape in new_shapes.items() if shape != tuple(tensors[name].shape)}
    touched = {name.rpartition(".")[0] for name in resized}
    touched |= {path for path, values in record.attributes.items() if "groups" in values or "num_groups" in values}
    for path in touched:
        settings += layer(path).checked_changes(new_shapes)
    for path in record.attributes:
        layer(path).check_derived(new_shapes)

    # everything fits; from here on nothing can be refused
    for key in {id(tensors[name]): None for name in tensors if name in resized}:
        names = aliases[key]
        tensor, shape = tensors[names[0]], new_shapes[names[0]]
        if tensor.is_meta or isinstance(tensor, nn.Parameter):
            resized_tensor = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
        else:  # a buffer that checkpoints leave out repeats its values along what was removed
            resized_tensor = tensor[tuple(map(slice, shape))].clone()
        replace_tensor(modules, names, resized_tensor)
    for path in record.biases:
        weight: Tensor = modules[path].weight  # type: ignore[assignment]
        bias = torch.empty(weight.shape[0], dtype=weight.dtype, device=weight.device)
        modules[path].bias = nn.Parameter(bias)
    for module, name, value in settings:
        vars(module)[name] = value  # where it was found; nn.Module.__setattr__ would look for tensors of that name


def _settings(
    path: str, values: Mapping[str, int | Shape], modules: Mapping[str, nn.Module]
) -> Iterator[tuple[nn.Module, str, Any]]:
    place = f"attributes[{_shown(path)}]"
    if path not in modules:
        _refuse(place, "a name", "of no module of this architecture")
    module = modules[path]
    for name, value in values.items():
        here = f"{place}[{_shown(name)}]"
        if name not in SIZE_ATTRIBUTES:
            _refuse(here, "this name", "is not an attribute that holds a size")
        held = vars(module).get(name)
        if type(held) is int:
            if type(value) is not int or not 1 <= value <= held:
                _refuse(here, value, f"must be an integer from 1 to {held}")
        elif isinstance(held, (list, tuple)) and held and all(type(item) is int for item in held):
            if not isinstance(value, tuple) or len(value) != len(held):
                _refuse(here, value, f"must be a list of {len(held)} sizes")
            for i, (item, most) in enumerate(zip(value, held, strict=True)):
                if item > most:
                    _refuse(f"{here}[{i}]", item, f"is more than the {most} that the configuration builds")
            value = with_item_type(held, value)
        else:
            _refuse(here, "this name", "is not a size that this module holds")
        yield module, name, value


def _check_bias(path: str, modules: Mapping[str, nn.Module], shapes: Mapping[str, Shape]) -> None:
    place = f"biases[{_shown(path)}]"
    module = modules.get(path)
    if module is None:
        _refuse(place, "a name", "of no module of this architecture")
    if not isinstance(module, _WITH_OPTIONAL_BIAS) or getattr(module, "transposed", False):
        _refuse(place, "a name", "of a module that is no linear layer or convolution")
    if module.bias is not None:
        _refuse(place, "a name", "of a layer that has a bias already")


class _Layer:
    """One module of a skeleton whose tensors change size.

    What follows from its shapes is found once: a skeleton has hundreds of layers, and loading a small checkpoint is made
    of little else.

    Args:
        given: (id of a module, attribute) -> the value that the record gives it.
    """

    def __init__(self, path: str, module: nn.Module, given: Mapping[tuple[int, str], Any]):
        self.path = path
        self.module = module
        self.old = local_shapes(module)
        self.prefix = f"{path}." if path else ""
        self.given = given
        count = group_count(module)
        self.is_standard = count is not None
        self.groups = 1 if count is None else count
        self.new_groups = given.get((id(module), "groups"), count) if self.is_standard else 1
        self.was = derived_attributes(module, self.old, self.groups)

    def following(self, weight: Shape) -> dict[str, Shape]:
        """Full names -> new shapes of what follows from the new shape of the weight.

        A tensor that does not follow in the layer as it is, which a subclass may have, is left alone.
        """
        if not self.is_standard:
            return {}
        was = followers(self.old, self.was)
        now = followers(self.old, derived_attributes(self.module, {**self.old, "weight": weight}, self.new_groups))
        return {self.prefix + name: shape for name, shape in now.items() if self.old[name] == was[name]}

    def checked_changes(self, shapes: Mapping[str, Shape]) -> list[tuple[nn.Module, str, Any]]:
        """New values of the attributes that follow from the new shapes, which must agree with each other."""
        new = {name: shapes[self.prefix + name] for name in self.old}
        if self.was and "weight" in self.old:
            self._check(new)
        if not self.is_standard:
            return []
        now = derived_attributes(self.module, new, self.new_groups)
        held = vars(self.module)
        return [
            (self.module, name, with_item_type(held[name], value))
            for name, value in derived_changes(self.module, self.was, now).items()
        ]

    def _check(self, new: Mapping[str, Shape]) -> None:
        # a bias, or a norm's statistic, that had the length of the weight's first dimension keeps it
        module, weight = self.module, self.old["weight"]
        is_transposed = isinstance(module, _WITH_OPTIONAL_BIAS) and getattr(module, "transposed", False)
        out = 1 if is_transposed or "nf" in self.was else 0  # nf: transformers' Conv1D
        old_factor, factor = (self.groups, self.new_groups) if out else (1, 1)
        for name, shape in new.items():
            if name != "weight" and len(shape) == 1 and shape[0] != new["weight"][out] * factor:
                if self.old[name][0] == weight[out] * old_factor:
                    place = f"shapes[{_shown(self.prefix + name)}]"
                    _refuse(place, shape[0], f"does not agree with the layer's weight, which has {new['weight'][out]}")
        if not isinstance(module, (*_WITH_OPTIONAL_BIAS, nn.GroupNorm)):
            return
        whole = new["weight"][0]
        for name in ("groups", "num_groups"):
            count = self.given.get((id(module), name), vars(module).get(name))
            if type(count) is int and count > 0 and whole % count:
                place = f"attributes[{_shown(self.path)}][{name!r}]"
                _refuse(place, count, f"groups do not divide the layer's {whole} channels")

    def check_derived(self, shapes: Mapping[str, Shape]) -> None:
        """An attribute that the record gives and that follows from the shapes must be what follows."""
        new = {name: shapes[self.prefix + name] for name in self.old}
        for name, law in derived_attributes(self.module, new, self.new_groups).items():
            value = self.given.get((id(self.module), name))
            if value is not None and not _same(value, law):
                place = f"attributes[{_shown(self.path)}][{name!r}]"
                _refuse(place, value, f"does not agree with the layer's tensors ({law})")


def record_of(model: nn.Module, *, may_be_quantized: bool = False) -> Record | None:
    """The record that a model carries, or None for one that is as its configuration class builds it.

    Raises:
        RecordError: when its configuration holds a malformed record.
        ModelError: when its configuration says that another library quantized it; or when this one did, whose weights
            cannot be cut either, unless ``may_be_quantized``; or when a search has not ended, whose mixtures no record
            can describe.
    """
    for module in model.modules():
        if end := getattr(type(module), "search_ends_by", None):
            raise ModelError(
                f"this {type(model).__name__} holds a {type(module).__name__}. End its search by {end} first."
            )
    if "hf_compress_quantization" in vars(model) and not may_be_quantized:
        raise ModelError(
            f"{type(model).__name__} is quantized, and its sizes can only be changed in float. Shrink it before it is "
            "quantized, or call model.dequantize() (hf_compress.quantization.dequantize) first."
        )
    own = vars(model).get("hf_compress_record")
    if own is not None:
        return own
    held = getattr(getattr(model, "config", None), "quantization_config", None)
    if held is None:
        return None
    if isinstance(held, dict):
        if held.get("quant_method") == "hf_compress":
            return Record.from_json(held.get("record", {}))
    elif getattr(held, "quant_method", None) == "hf_compress":
        return held.record
    raise ModelError(
        f"{type(model).__name__} was quantized by another method ({getattr(held, 'quant_method', type(held).__name__)}), "
        "whose weights cannot be cut. Load the model without quantization, shrink it, then quantize."
    )
