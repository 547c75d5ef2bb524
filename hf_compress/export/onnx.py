"""ONNX export with a free batch size, compared with the PyTorch model by ONNX Runtime before the file appears."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..axes.finding import Inputs, example_inputs_for, run_model, undisturbed
from ..errors import ExportError
from .outputs import named_outputs

_ONE_FILE_LIMIT = 1_900_000_000  # bytes; a protobuf message ends at 2 GiB


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: Inputs = None,
    *,
    check_inputs: Inputs = None,
    tolerance: float = 1e-4,
    int8: bool = False,
    calibration: Iterable[Any] | None = None,
    min_agreement: float = 0.9,
) -> Path:
    """Write a model as ONNX and compare it with PyTorch in ONNX Runtime at two batch sizes.

    The file has one input, ``pixel_values`` [batch, channels, height, width], and the outputs that a result is made from:
    ``logits``; of detectors ``pred_boxes`` too (see :data:`hf_compress.export.OUTPUTS`). The batch size is free. Weights are inside the file (beside it, as ``<name>.data``, above 1.9 GB). It appears under its name only
    once the comparison has succeeded. The model, its mode and the random state are left as they were.

    Args:
        model: a module that takes one image batch and returns a tensor, or an output with one of ``OUTPUTS`` at least.
        path: the file to write.
        example_inputs: a tensor, a tuple with one tensor or a dict with one tensor; gives the image size. Built from
            the model's configuration when not given.
        check_inputs: real images to compare on, in the same form, [n, channels, height, width]. Random ones when not
            given.
        tolerance: largest accepted absolute difference of any number of any output.
        int8: compute in int8, see :func:`hf_compress.export.export_int8_onnx`; ``tolerance`` then means nothing.
        calibration, min_agreement: of int8.

    Returns:
        The path.

    Raises:
        ExportError: when a package is missing, the model cannot be exported, or the two disagree.
    """
    _require("onnx", "onnxscript", "onnxruntime")
    if int8:
        from .int8 import export_int8_onnx

        check = None if check_inputs is None else _only_tensor(check_inputs)
        return export_int8_onnx(
            model, path, example_inputs, calibration=calibration, check_inputs=check, min_agreement=min_agreement
        )
    if calibration is not None:
        raise ExportError("calibration is for int8 files. Pass int8=True too, or leave it out.")
    path = Path(path)
    example = _only_tensor(example_inputs_for(model) if example_inputs is None else example_inputs)
    noise = torch.randn((3, *example.shape[1:]), generator=torch.Generator().manual_seed(0))
    check = noise.to(example.dtype) if check_inputs is None else _only_tensor(check_inputs)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        written = Path(folder) / path.name
        _write(model, written, example)
        for images in (check[:1], check if len(check) > 1 else check.repeat(3, 1, 1, 1)):
            difference = onnx_difference(model, written, images)
            if not difference <= tolerance:  # also when it is NaN
                raise ExportError(
                    f"{path.name} and {type(model).__name__} differ by {difference:.2e} on {len(images)} image(s), more "
                    f"than tolerance={tolerance:.0e}; nothing was written. Allow more with tolerance=, or export the "
                    "model in float32."
                )
        for part in sorted(Path(folder).iterdir(), key=lambda part: part == written):  # the file itself comes last
            os.replace(part, path.parent / part.name)
    return path


def onnx_difference(model: nn.Module, path: str | Path, pixel_values: Tensor) -> float:
    """Largest absolute difference of any number of any output between ONNX Runtime and the PyTorch model.

    Args:
        model: the model that was exported.
        path: the ONNX file.
        pixel_values: images [n, channels, height, width], on any device.

    Raises:
        ExportError: when the two do not return the same outputs.
    """
    parameter = next(model.parameters(), pixel_values)
    with undisturbed(model), torch.no_grad():
        expected = named_outputs(run_model(model, pixel_values.to(parameter.device, parameter.dtype)))
    found = onnx_outputs(path)(pixel_values.to(parameter.dtype))
    shapes = [{name: list(tensor.shape) for name, tensor in each.items()} for each in (found, expected)]
    if shapes[0] != shapes[1]:
        raise ExportError(f"{path} returns {shapes[0]}, the PyTorch model {shapes[1]}.")
    return max(largest_difference(found[name], tensor) for name, tensor in expected.items())


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Of any number of two tensors of one shape, in double precision; 0 for empty ones."""
    return float((found.cpu().double() - expected.cpu().double()).abs().max()) if found.numel() else 0.0


def onnx_outputs(path: str | Path) -> Callable[[Tensor], dict[str, Tensor]]:
    """A function that runs an ONNX file on the CPU with as many threads as torch uses.

    Returns:
        images [n, channels, height, width] -> name of an output -> float tensor on the CPU.

    Raises:
        ExportError: when ONNX Runtime is missing or cannot read the file.
    """
    (runtime,) = _require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot read {path}: {error}. Export the model again.") from error
    given = session.get_inputs()[0].name
    names = [output.name for output in session.get_outputs()]

    def run(pixel_values: Tensor) -> dict[str, Tensor]:
        arrays = session.run(names, {given: pixel_values.detach().cpu().contiguous().numpy()})
        return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}

    return run


def onnx_runner(path: str | Path) -> Callable[[Tensor], Tensor]:
    """:func:`onnx_outputs` for files where one output matters: images -> the first output, ``logits`` where there are some."""
    run = onnx_outputs(path)
    return lambda pixel_values: next(iter(run(pixel_values).values()))


class OnnxModel(nn.Module):
    """An ONNX file in place of the model that it came from, for whatever evaluates that: an output with its names.

    Raises:
        ExportError: when ONNX Runtime is missing or cannot read the file.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        self._run = onnx_outputs(path)

    def forward(self, pixel_values: Tensor, **others: Any) -> SimpleNamespace:
        """[n, channels, height, width] -> an object with the file's outputs as attributes; masks of padding are unknown."""
        return SimpleNamespace(**self._run(pixel_values))


class _OutputsOnly(nn.Module):
    """Turns a model's output object into the tensors that the file returns."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return named_outputs(run_model(self.model, pixel_values))


def _only_tensor(inputs: Any) -> Tensor:
    values = [inputs] if isinstance(inputs, Tensor) else list(inputs.values() if hasattr(inputs, "values") else inputs)
    if len(values) != 1 or not isinstance(values[0], Tensor):
        raise ExportError(
            f"one input tensor can be exported, and {len(values)} inputs were given. Pass the images alone."
        )
    return values[0]


def _write(model: nn.Module, path: Path, example: Tensor) -> None:
    # torch.export makes a constant of a dimension of size 1, so it is shown a batch of two
    images = example[:1].expand(2, *example.shape[1:]).contiguous()
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    with undisturbed(model), torch.no_grad(), _quiet():
        try:
            whole = _OutputsOnly(model).eval()
            program = torch.onnx.export(
                whole,
                (images,),
                input_names=["pixel_values"],
                output_names=list(whole(images)),
                dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch", min=1)}},
                dynamo=True,
                verbose=False,
            )
            assert program is not None  # with dynamo=True it never is
            _strip(program.model.graph)
            for function in program.model.functions.values():
                _strip(function)
            program.save(path, external_data=weights > _ONE_FILE_LIMIT)
        except Exception as error:
            reason = str(error.__cause__ or error).strip().splitlines() or [""]
            raise ExportError(
                f"{type(model).__name__} cannot be exported ({type(error).__name__}: {reason[0]}). The model's forward "
                "must be traceable by torch.export; see the chained error."
            ) from error


def _strip(graph: Any) -> None:
    """Remove what the exporter notes on every node: stack traces with paths of this machine, most of a small file."""
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in [*graph.inputs, *graph.outputs]:
        value.metadata_props.clear()
    graph.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress and deprecation warnings; what matters arrives as an exception."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _require(*names: str) -> list[Any]:
    modules = []
    for name in names:
        try:
            modules.append(import_module(name))
        except ImportError as error:
            raise ExportError(
                f"ONNX export needs the package {name}, which is not installed. Try: pip install hf-compress[export]"
            ) from error
    return modules
