"""What is quantized, and how: the part of ``HfCompressConfig`` that speaks of bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hf_compress.errors import HfCompressError, MethodError, RecordError

from .quantizers import SCALES

ACTIVATION_SCHEMES = ("clipped_relu", "static", "dynamic")
#: "dense": the checkpoint holds float weights to be quantized at load; "training": float weights and what quantizers
#: have learned; "packed": codes and scales.
FORMATS = ("dense", "training", "packed")
SKIP_WORDS = ("first", "last", "positions")
WEIGHT_NAMES = {"binary": 1, "ternary": 2}

_VERSION = 1
_MOST_NAMES = 100_000


@dataclass(frozen=True)
class Quantization:
    """Bits and rules, and once a model is known, which of its modules they apply to.

    Args:
        weights: bits of weights, 1 to 8, or "binary" (1) or "ternary" (2); None leaves them float.
        scale: a rule of :mod:`~hf_compress.quantization.quantizers`: "least_squares", "learned", "bcgd" or "bcgd_numel".
        per_channel: one scale per output channel, else one per tensor (the papers).
        activations: bits of activations, 1 to 8; None leaves them float.
        activation_scheme: "dynamic" (the inputs of quantized layers, ranges of each example; needs no data), "static"
            (the same with a fixed range for each layer, from calibration batches) or "clipped_relu" (the outputs of
            ReLU modules, with a trainable resolution).
        skip: what stays float: "first" (the first layer), "last" (the last, and those with one output per class),
            "positions" (layers with ``position`` in their name), and glob patterns of module names.
        format: one of :data:`FORMATS`.
        layers: names of the modules whose weights are quantized; None until a model is known.
        activation_layers: names of those whose inputs (or, for "clipped_relu", outputs) are.

    Raises:
        MethodError: for a value that is not possible.
    """

    weights: int | None = None
    scale: str = "least_squares"
    per_channel: bool = True
    activations: int | None = None
    activation_scheme: str = "dynamic"
    skip: tuple[str, ...] = SKIP_WORDS
    format: str = "dense"
    layers: tuple[str, ...] | None = None
    activation_layers: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.weights, str):
            object.__setattr__(self, "weights", WEIGHT_NAMES.get(self.weights, self.weights))
        if isinstance(self.skip, str):
            object.__setattr__(self, "skip", (self.skip,))
        for name in ("weights", "activations"):
            bits = getattr(self, name)
            if bits is not None and (type(bits) is not int or not 1 <= bits <= 8):
                names = " or ".join(map(repr, WEIGHT_NAMES))
                raise MethodError(
                    f"{name}={_shown(bits)} is not possible: bits are an integer from 1 to 8"
                    f"{f', {names}' if name == 'weights' else ''}, or None for float."
                )
        if self.weights is None and self.activations is None:
            raise MethodError("nothing to quantize: give weights=, activations= or both, in bits from 1 to 8.")
        for name, known in (("scale", SCALES), ("activation_scheme", ACTIVATION_SCHEMES), ("format", FORMATS)):
            if getattr(self, name) not in known:
                raise MethodError(f"{name}={_shown(getattr(self, name))} is not known; give one of {', '.join(known)}.")
        if type(self.per_channel) is not bool:
            raise MethodError(f"per_channel={_shown(self.per_channel)} is not possible: it is True or False.")
        for name in ("skip", "layers", "activation_layers"):
            value = getattr(self, name)
            if value is None and name != "skip":
                continue
            if not isinstance(value, Sequence) or not all(isinstance(item, str) for item in value[:_MOST_NAMES]):
                raise MethodError(f"{name}={_shown(value)} is not possible: it is a list of names.")
            if len(value) > _MOST_NAMES:
                raise MethodError(f"{name} has {len(value)} entries, more than the {_MOST_NAMES} that any model needs.")
            object.__setattr__(self, name, tuple(value))

    def __deepcopy__(self, memo: object) -> Quantization:
        return self

    @property
    def needs_batches(self) -> bool:
        """Whether the activations' ranges come from data."""
        return self.activations is not None and self.activation_scheme != "dynamic"

    def asks_for_the_same(self, other: Quantization) -> bool:
        """Whether two differ in nothing but the model that they were resolved on."""
        unresolved = {"format": "dense", "layers": None, "activation_layers": None}
        return replace(self, **unresolved) == replace(other, **unresolved)  # type: ignore[arg-type]

    def to_json(self) -> dict[str, Any]:
        """As JSON data."""
        data: dict[str, Any] = {"version": _VERSION}
        for name in _FIELDS:
            value = getattr(self, name)
            if not (name in ("layers", "activation_layers") and value is None):
                data[name] = list(value) if isinstance(value, tuple) else value
        return data

    @classmethod
    def from_json(cls, data: Any) -> Quantization:
        """Read and check JSON data that may be hostile.

        Raises:
            RecordError: naming the field that is not as it must be.
        """
        if not isinstance(data, Mapping):
            raise RecordError(f"quantization: {_shown(data)} must be a JSON object. {_AGAIN}")
        version = data.get("version")
        if type(version) is not int or version < 1:
            raise RecordError(f"quantization: version: {_shown(version)} must be an integer from 1 to {_VERSION}.")
        if version > _VERSION:
            raise RecordError(
                f"quantization: the checkpoint was written in version {_shown(version)}; this hf_compress reads up to "
                f"{_VERSION}. Upgrade hf_compress (pip install -U hf-compress)."
            )
        unknown = [key for key in data if key not in (*_FIELDS, "version")]
        if unknown:
            raise RecordError(
                f"quantization: the field {_shown(unknown[0])} is not known; the fields are {', '.join(_FIELDS)}. {_AGAIN}"
            )
        if isinstance(data.get("weights"), str) or isinstance(data.get("skip", []), str):
            raise RecordError(f"quantization: weights must be an integer and skip a list. {_AGAIN}")
        try:
            found = cls(**{key: value for key, value in data.items() if key != "version"})
        except HfCompressError as error:
            raise RecordError(f"quantization: {error} {_AGAIN}") from error
        if found.format != "dense" and (found.layers is None or found.activation_layers is None):
            raise RecordError(f"quantization: layers and activation_layers are missing. {_AGAIN}")
        for bits, names in ((found.weights, found.layers), (found.activations, found.activation_layers)):
            if names is not None and (bits is None) != (not names):
                raise RecordError(f"quantization: bits={bits} and {len(names)} layers do not fit. {_AGAIN}")
            if len(set(names or ())) != len(names or ()):
                raise RecordError(f"quantization: a module is listed twice. {_AGAIN}")
        return found


_FIELDS = tuple(Quantization.__dataclass_fields__)
_AGAIN = (
    "The quantization_config in config.json was not written by hf_compress for this model, or was changed since; save "
    "the checkpoint again."
)


def _shown(value: Any) -> str:
    """A short form of a value of any origin, made without walking through it."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:60] + "...")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**18:
        return "a huge integer"
    return repr(value) if value is None or isinstance(value, (bool, int, float)) else f"a {type(value).__name__}"
