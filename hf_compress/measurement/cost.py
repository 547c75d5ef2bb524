"""``measure``: parameters, multiply-accumulates, bytes and latency of one model.

MACs are counted by :class:`torch.utils.flop_counter.FlopCounterMode` (2 FLOPs to a MAC) on the operators that really
run. It knows no entry for the fused attention of the CPU, so scaled-dot-product attention is held to its plain
implementation while counting. Fourier transforms are added to it, and products of complex matrices as the four real
ones that they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ..axes.finding import Inputs, example_inputs_for, run_examples, run_model, undisturbed
from ..axes.fourier import transform_macs
from ..errors import CheckpointError
from .latency import compare_latency


@dataclass(frozen=True)
class Measurement:
    """What a model costs.

    Attributes:
        params: number of parameters; shared ones count once.
        macs: multiply-accumulates of one example.
        bytes: size of the model's state as one safetensors file.
        latency_ms: milliseconds of one forward pass on one example, the median of several rounds.
    """

    params: int
    macs: int
    bytes: int
    latency_ms: float


def measure(model: nn.Module, example_inputs: Inputs = None, *, rounds: int = 15) -> Measurement:
    """Measure a model on its own device and in its own dtype.

    The model is run in evaluation mode; its mode, its buffers and the random state are left as they were.

    Args:
        model: any module that runs eagerly.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs; the first example of a batch
            is used. Built from the model's configuration when not given.
        rounds: of the latency, about 20 ms each.

    Raises:
        ModelError: when the model cannot be run on the inputs.
    """
    inputs = first_example(example_inputs_for(model) if example_inputs is None else example_inputs)
    macs = count_macs(model, inputs)
    with undisturbed(model):
        latency_ms = compare_latency({"model": lambda: run_model(model, inputs)}, rounds)["model"]
    return Measurement(sum(p.numel() for p in model.parameters()), macs, state_bytes(model), latency_ms)


def count_macs(model: nn.Module, example_inputs: Inputs = None) -> int:
    """Multiply-accumulates of one example: convolutions, matrix products and attention.

    Args:
        model: any module that runs eagerly.
        example_inputs: as for :func:`measure`.

    Raises:
        ModelError: when the model cannot be run on the inputs.
    """
    inputs = first_example(example_inputs_for(model) if example_inputs is None else example_inputs)
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with undisturbed(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        run_examples(model, inputs)
    return counter.get_total_flops() // 2


def _of_product(formula: Callable[..., int]) -> Callable[..., int]:
    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return formula(*args, out_val=out_val, **kwargs) * (4 if out_val.is_complex() else 1)

    count._get_raw = True  # type: ignore[attr-defined]  # torch's mark of a formula that wants tensors, not shapes
    return count


def _of_transform(signal: Tensor, dim: list[int], *args: Any, out_val: Any = None, **kwargs: Any) -> int:
    whole = signal if not signal.is_complex() else out_val  # of the two the one that has every point
    points = prod(whole.shape[position] for position in dim)
    is_real = not (signal.is_complex() and out_val.is_complex())
    return 2 * transform_macs(points, is_real) * (whole.numel() // points)


_of_transform._get_raw = True  # type: ignore[attr-defined]
_ATEN = torch.ops.aten
_FORMULAS: dict[Any, Any] = {
    **{op: _of_product(flop_registry[op]) for op in (_ATEN.mm, _ATEN.addmm, _ATEN.bmm, _ATEN.baddbmm)},
    **dict.fromkeys((_ATEN._fft_r2c, _ATEN._fft_c2r, _ATEN._fft_c2c), _of_transform),
}


def first_example(inputs: Any) -> Any:
    """The first example of a batch, as a batch of one; all tensors share their first dimension."""
    if isinstance(inputs, Tensor):
        return inputs[:1]
    if isinstance(inputs, Mapping):
        return {name: first_example(value) for name, value in inputs.items()}
    return tuple(first_example(value) for value in inputs) if isinstance(inputs, (tuple, list)) else inputs


def state_bytes(model: nn.Module) -> int:
    """Size of the model's state as one safetensors file; a tensor that two names share counts once."""
    from safetensors.torch import save

    tensors: dict[tuple[Any, ...], tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        tensors.setdefault(place if tensor.numel() else (name,), (name, tensor))
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.values()
    }
    return len(save(copies, metadata={"format": "pt"}))


def checkpoint_bytes(folder: str | Path) -> int:
    """Bytes of the weights that a saved model has on disk, all shards together.

    Raises:
        CheckpointError: when the folder holds no safetensors file.
    """
    sizes = [path.stat().st_size for path in Path(folder).glob("*.safetensors")]
    if not sizes:
        raise CheckpointError(
            f"{folder} holds no *.safetensors file. Give a folder that `save_pretrained` wrote, or save the model first."
        )
    return sum(sizes)
