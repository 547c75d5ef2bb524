"""What a compressed checkpoint says of itself in ``config.json``, under ``quantization_config``.

transformers calls every departure from the architecture that a configuration class builds a quantization, and looks up
who can undo or redo it by ``quant_method``. Ours is ``"hf_compress"``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_compress.errors import ModelError, RecordError
from hf_compress.quantization.scheme import SKIP_WORDS, Quantization
from hf_compress.surgery.skeleton import Record

QUANT_METHOD = "hf_compress"

_SETTINGS = ("least_squares", True, "dynamic", SKIP_WORDS)
STORAGES = ("dense", "sparse")


class HfCompressConfig(QuantizationConfigMixin):
    """How a model differs from what its configuration class builds, and in how many bits it is held.

    ``from_pretrained(name, quantization_config=HfCompressConfig(weights=4))`` quantizes a float checkpoint, pruned or
    not, while loading it. Training in low bits: :class:`~hf_compress.methods.QuantizationAwareTrainingCallback`; ranges
    of activations from calibration batches: :func:`hf_compress.quantization.quantize`.

    Args:
        record: a :class:`~hf_compress.surgery.Record`, or its JSON form, which is checked as hostile input.
        weights, activations, scale, per_channel, activation_scheme, skip: see
            :class:`~hf_compress.quantization.Quantization`. Nothing is quantized when no bits are given.
        quantization: the same as one object or its JSON form, which is checked as hostile input.
        storage: ``"sparse"`` stores tensors with many zeros as a bitmask and values; see :mod:`.sparse_storage`.

    Raises:
        MethodError: when bits or rules are not possible.
        RecordError: when the JSON is malformed, or there are fields that this version does not know.
    """

    def __init__(
        self,
        record: Record | Mapping[str, Any] | None = None,
        *,
        weights: int | str | None = None,
        activations: int | None = None,
        scale: str = "least_squares",
        per_channel: bool = True,
        activation_scheme: str = "dynamic",
        skip: str | Sequence[str] = SKIP_WORDS,
        quantization: Quantization | Mapping[str, Any] | None = None,
        storage: str = "dense",
        **unknown: Any,
    ):
        unknown.pop("quant_method", None)
        if unknown:
            raise RecordError(
                f"quantization_config: the field {str(next(iter(unknown)))[:60]!r} is not known; the fields are "
                "quant_method, record, quantization and storage. Upgrade hf_compress (pip install -U hf-compress), or save the "
                "checkpoint again."
            )
        if storage not in STORAGES:
            raise RecordError(
                f"quantization_config: storage={str(storage)[:60]!r} is not known; it is 'dense' or 'sparse'. Upgrade "
                "hf_compress (pip install -U hf-compress), or save the checkpoint again."
            )
        self.storage = storage
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # the enumeration is closed; the registry is not
        if record is None:
            record = Record()
        self.record: Record = record if isinstance(record, Record) else Record.from_json(record)
        self._quantization: Quantization | None = None
        settings = (scale, per_channel, activation_scheme, skip)
        if quantization is not None:
            is_read = isinstance(quantization, Quantization)
            self._quantization = quantization if is_read else Quantization.from_json(quantization)  # type: ignore[assignment]
        elif weights is not None or activations is not None or settings != _SETTINGS:
            self._quantization = Quantization(weights, scale, per_channel, activations, activation_scheme, skip)  # type: ignore[arg-type]

    @property
    def quantization(self) -> Quantization | None:
        """In how many bits the model is held; None when all of it is float."""
        return self._quantization

    @quantization.setter
    def quantization(self, asked: Quantization | None) -> None:
        # transformers sets it to what the caller of from_pretrained asks for, on the configuration of the checkpoint
        held = self._quantization
        if held is None or held.format == "dense":
            self._quantization = asked
        elif asked is not None and not asked.asks_for_the_same(held):
            raise ModelError(
                f"the checkpoint is quantized already (weights={held.weights}, activations={held.activations}). Load it "
                "without quantization_config, and call model.dequantize() before quantizing in another way."
            )

    def get_loading_attributes(self) -> dict[str, Any]:
        """What ``from_pretrained`` takes over into the configuration of a checkpoint that has one, say of pruning."""
        taken: dict[str, Any] = {} if self._quantization is None else {"quantization": self._quantization}
        return taken if self.storage == "dense" else {**taken, "storage": self.storage}

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON data."""
        data: dict[str, Any] = {"quant_method": QUANT_METHOD, "record": self.record.to_json()}
        if self._quantization is not None:
            data["quantization"] = self._quantization.to_json()
        if self.storage != "dense":
            data["storage"] = self.storage
        return data

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HfCompressConfig) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(QUANT_METHOD)


def storage_of(config: Any) -> str:
    """How a model with this configuration stores tensors: ``"sparse"`` or ``"dense"``."""
    held = getattr(config, "quantization_config", None)
    found = held.get("storage") if isinstance(held, Mapping) else getattr(held, "storage", None)
    return found or "dense"
