"""What a compressed checkpoint says of itself in ``config.json``, under ``quantization_config``.

transformers calls every departure from the architecture that a configuration class builds a quantization, and looks up
who can undo or redo it by ``quant_method``. Ours is ``"hf_compress"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_compress.errors import RecordError
from hf_compress.surgery.skeleton import Record

QUANT_METHOD = "hf_compress"


class HfCompressConfig(QuantizationConfigMixin):
    """How a model differs from what its configuration class builds.

    Args:
        record: a :class:`~hf_compress.surgery.Record`, or its JSON form, which is checked as hostile input.

    Raises:
        RecordError: when the record is malformed, or there are fields that this version does not know.
    """

    def __init__(self, record: Record | Mapping[str, Any] | None = None, **unknown: Any):
        unknown.pop("quant_method", None)
        if unknown:
            raise RecordError(
                f"quantization_config: the field {str(next(iter(unknown)))[:60]!r} is not known; the fields are "
                "quant_method and record. Upgrade hf_compress (pip install -U hf-compress), or save the checkpoint again."
            )
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # the enumeration is closed; the registry is not
        if record is None:
            record = Record()
        self.record: Record = record if isinstance(record, Record) else Record.from_json(record)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON data."""
        return {"quant_method": QUANT_METHOD, "record": self.record.to_json()}

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HfCompressConfig) and self.record == other.record

    def __hash__(self) -> int:
        return hash(QUANT_METHOD)
