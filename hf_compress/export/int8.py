"""ONNX files that compute in int8: QDQ with one scale per output channel, run by ONNX Runtime.

*Static* (with calibration images): every activation between quantized operators has a fixed range, so that convolutions,
matrix products, additions and pooling run in int8. *Dynamic* (without): matrix products of linear layers alone, with
ranges found while running; convolutions stay float, since ONNX Runtime has no fast kernel for them in that form. Where
most layers are linear (transformers), both are made when there are images, and the one that is faster on this machine is
kept.

Layers that the model quantizes to eight bits on their inputs are written as float layers and quantized by the runtime's
own operators; with fewer bits the levels are part of the graph.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..axes.finding import Inputs, run_model, undisturbed
from ..errors import DataError, ExportError
from ..quantization.calibration import images_of
from ..quantization.layers import BOUNDS, FrozenWeight, InputQuantizer, quantizable_layers, quantization_of
from ..quantization.quantizers import affine_of
from .onnx import export_onnx, onnx_outputs, onnx_runner
from .outputs import named_outputs

_MOST_IMAGES = 512


@dataclass(frozen=True)
class Agreement:
    """How an int8 file compares with the PyTorch model on some images.

    Args:
        argmax: share of images (of pixels for logits with four dimensions) with the same class, 0 to 1. None where a
            class of every row means nothing: of detectors, most of whose rows are background, and of models that give
            one number.
        mean_difference: mean absolute difference of a number of the first output, such as a logit.
        relative_difference: the same, relative to the mean absolute number.
        images: how many there were.
    """

    argmax: float | None
    mean_difference: float
    relative_difference: float
    images: int

    @property
    def share(self) -> float:
        """The agreement in one number: ``argmax``, or what the relative difference leaves of 1."""
        return 1 - self.relative_difference if self.argmax is None else self.argmax

    def __str__(self) -> str:
        if self.argmax is None:
            return f"outputs that differ by {self.relative_difference:.1%} on average"
        return f"the same class as PyTorch for {self.argmax:.1%}"


def export_int8_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: Inputs = None,
    *,
    calibration: Iterable[Any] | None = None,
    check_inputs: Tensor | None = None,
    min_agreement: float = 0.9,
    reduce_range: bool | None = None,
) -> Path:
    """Write a model as an ONNX file that computes in int8, and compare it with the PyTorch model.

    Input and output are as in :func:`export_onnx`. The file appears under its name only once the comparison has
    succeeded. The model is left as it was; float models can be given as well as quantized ones, whose own (fake)
    quantization is what is compared with.

    Args:
        model: a model in float32 with one of ``OUTPUTS`` at least. What it computes behind its last weights (decoding of
            boxes, softmax) stays float.
        path: the file to write.
        example_inputs: see :func:`export_onnx`.
        calibration: batches of images, as a ``DataLoader`` gives them, for the static form; at most 512 images are
            used. Without them the dynamic form is written. Convolutional networks need the static one to be faster
            than in float; of transformers both are tried, on one image.
        check_inputs: images [n, channels, height, width] to compare on; the calibration images when not given.
        min_agreement: smallest accepted :attr:`Agreement.share`: of images with the same class as in PyTorch, 0 to 1.
        reduce_range: keep weights to seven bits, so that no int16 sum of two products overflows on x86 processors
            without VNNI. By default where this machine is one.

    Returns:
        The path.

    Raises:
        ExportError: when a package is missing, the model cannot be exported, or the two disagree.
        DataError: when ``calibration`` holds no image.
    """
    path = Path(path)
    images = None if calibration is None else _gathered(calibration)
    if reduce_range is None:
        reduce_range = _overflows()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        whole, written = Path(folder) / "float.onnx", Path(folder) / path.name
        with _float_inputs(model):
            export_onnx(
                model, whole, example_inputs, check_inputs=None if images is None else images[:2], tolerance=1e-2
            )
        check = images if check_inputs is None else check_inputs
        forms: list[tuple[Path, Tensor | None]] = [(written, images)]
        if images is not None and _is_mostly_linear(model):
            forms.append((written.with_name("dynamic.onnx"), None))
        agreements: dict[Path, Agreement] = {}
        for file, calibrated_on in forms:
            _quantize(model, whole, file, calibrated_on, reduce_range)
            if check is not None:
                agreements[file] = int8_agreement(model, file, check)
        usable = [file for file, found in agreements.items() if found.share >= min_agreement]
        if agreements and not usable:
            found = max(agreements.values(), key=lambda found: found.share)
            raise ExportError(
                f"the int8 file of {type(model).__name__} gives {found} (of {found.images} images), an agreement of "
                f"{found.share:.3f}, less than min_agreement={min_agreement}; nothing was written. "
                "Give more calibration images, train with activations=8, or allow less."
            )
        if len(forms) > 1:
            os.replace(_fastest(usable, check[:1]), written)  # type: ignore[index]
            forms[1][0].unlink(missing_ok=True)
        whole.unlink()
        for part in sorted(Path(folder).iterdir(), key=lambda part: part == written):  # the file itself comes last
            os.replace(part, path.parent / part.name)
    return path


def int8_agreement(model: nn.Module, path: str | Path, images: Tensor, batch: int = 64) -> Agreement:
    """Compare an ONNX file with the PyTorch model.

    Args:
        model: the model that was exported; a quantized one computes with its own quantizers.
        path: the ONNX file.
        images: [n, channels, height, width].
        batch: images in one call.
    """
    run = onnx_outputs(path)
    parameter = next(model.parameters())
    expected, found, name = [], [], ""
    with undisturbed(model), torch.no_grad():
        for part in images.split(batch):
            outputs = named_outputs(run_model(model, part.to(parameter.device, parameter.dtype)))
            name = next(iter(outputs))
            expected.append(outputs[name].float().cpu())
            found.append(run(part)[name].float())
    ours, theirs = torch.cat(expected), torch.cat(found)
    difference = (ours - theirs).abs().mean().item()
    same = None
    if name == "logits" and ours.dim() in (2, 4) and ours.shape[1] > 1:  # classes of an image, or of every pixel
        same = (ours.argmax(1) == theirs.argmax(1)).float().mean().item()
    return Agreement(same, difference, difference / max(ours.abs().mean().item(), 1e-12), len(ours))


def _is_mostly_linear(model: nn.Module) -> bool:
    layers = [*quantizable_layers(model).values()]
    return sum(isinstance(layer, nn.modules.conv._ConvNd) for layer in layers) < len(layers) / 2


def _fastest(files: list[Path], image: Tensor) -> Path:
    """The file that ONNX Runtime runs in the shortest time on one image."""
    from ..measurement.latency import compare_latency

    def caller(file: Path) -> Callable[[], Any]:
        run = onnx_runner(file)
        return lambda: run(image)

    times = compare_latency({str(file): caller(file) for file in files}, 5)
    return min(files, key=lambda file: times[str(file)])


def _gathered(batches: Iterable[Any]) -> Tensor:
    held: list[Tensor] = []
    for batch in batches:
        held.append(images_of(batch).cpu().float())
        if sum(map(len, held)) >= _MOST_IMAGES:
            break
    if not sum(map(len, held)):
        raise DataError(
            "calibration holds no image. Give a few hundred, for example a DataLoader, or leave it out for the dynamic "
            "form."
        )
    return torch.cat(held)[:_MOST_IMAGES]


def _overflows() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "flags" in flags and "vnni" not in flags  # an Arm processor lists "Features"


@contextlib.contextmanager
def _float_inputs(model: nn.Module) -> Iterator[None]:
    """Without the eight-bit quantizers of inputs, whose work the runtime's operators do."""
    taken = []
    for module in model.modules():
        quantizer = vars(module).get("hf_compress_input")
        if isinstance(quantizer, InputQuantizer) and quantizer.bits == 8:
            taken.append((module, vars(module).pop("hf_compress_input")))
    try:
        yield
    finally:
        for module, quantizer in taken:
            vars(module)["hf_compress_input"] = quantizer


def _weights_in(model: nn.Module, graph: Any) -> dict[str, tuple[str, Tensor, bool]]:
    """Path of a layer -> name and values of its weight in the file, and whether it lies there transposed.

    The exporter keeps names, and folds BatchNorm into the values; but what a matrix product reads it transposes and calls
    otherwise, so that such a weight is found by its values.
    """
    from onnx import numpy_helper

    held = {item.name: item for item in graph.initializer}
    matrices = {name for node in graph.node if node.op_type == "MatMul" for name in node.input if name in held}
    others: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
    for name in sorted(matrices):
        values = torch.from_numpy(numpy_helper.to_array(held[name]).copy())
        others.setdefault(tuple(values.shape), []).append((name, values))
    found: dict[str, tuple[str, Tensor, bool]] = {}
    for path, layer in quantizable_layers(model).items():
        weight = cast(Tensor, layer.weight).detach().cpu().float()
        item = held.get(f"model.{path}.weight")
        if item is not None:
            found[path] = item.name, torch.from_numpy(numpy_helper.to_array(item).copy()), False
            continue
        for name, values in others.get(tuple(weight.mT.shape), []):
            if torch.equal(values, weight.mT):
                found[path] = name, values, True
                break
    return found


def _float_layers(model: nn.Module) -> set[str]:
    """Paths of the layers that a quantized model leaves float; none of a model that is float itself."""
    scheme = quantization_of(model)
    if scheme is None:
        return set()
    return {*quantizable_layers(model)} - {*(scheme.layers or ()), *(scheme.activation_layers or ())}


def _behind_the_weights(graph: Any) -> list[str]:
    """Names of the nodes from which no product follows; eight bits are too few for what boxes are made of."""
    feeding: set[str] = set()  # tensors on the way to a product
    behind = []
    for node in reversed(graph.node):  # sorted, so that whoever reads a tensor comes first here
        if node.op_type in ("Conv", "ConvTranspose", "MatMul", "Gemm") or feeding.intersection(node.output):
            feeding.update(node.input)
        else:
            behind.append(node.name)
    return behind


def _own_grids(
    model: nn.Module, graph: Any, weights: dict[str, tuple[str, Tensor, bool]], reduce_range: bool
) -> dict[str, list[dict[str, Any]]]:
    """Scales that the model has for tensors of the file, as ONNX Runtime's tools take them.

    Without them weights on a grid would be rounded to another one, and activations to ranges that the model was not
    trained with. The exporter folds BatchNorm into convolutions, so scales are read off the file's weights with the help
    of the model's codes.
    """
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: dict[str, list[dict[str, Any]]] = {}
    ranges: dict[str, list[dict[str, Any] | None]] = {}
    for path, (name, written, is_transposed) in weights.items():
        layer = model.get_submodule(path)
        if len(readers[name]) != 1:
            continue
        held = vars(layer).get("hf_compress_weight")
        if isinstance(held, FrozenWeight) and not (reduce_range and held.quantizer.bits == 8):
            codes, dim = held.codes(cast(Tensor, layer._parameters["weight"]), path), held.quantizer.channel_dim or 0
            grid = _grid(written, codes.mT if is_transposed else codes, 1 - dim if is_transposed else dim)
            if grid is not None:
                found[name] = grid
        quantizer = vars(layer).get("hf_compress_input")
        own = None
        if isinstance(quantizer, InputQuantizer) and quantizer.bits == 8 and quantizer.scheme == "static":
            step, zero = affine_of(cast(Tensor, layer._parameters[BOUNDS]).detach().float(), 8)
            own = {"scale": np.array(step, np.float32), "zero_point": np.array(zero, np.uint8)}
        ranges.setdefault(readers[name][0].input[0], []).append(own)
    for name, given in ranges.items():
        # a tensor has one scale in the file; layers that disagree leave it to calibration
        if given[0] is not None and all(other == given[0] for other in given):
            found[name] = [given[0]]
    return found


def _grid(weight: Tensor, codes: Tensor, axis: int) -> list[dict[str, Any]] | None:
    """The scale of every channel along an axis of a weight that is a multiple of integers; None where it is not."""
    if weight.shape != codes.shape or codes.abs().max() > 127:
        return None
    rows, whole = (tensor.transpose(0, axis).flatten(1).double() for tensor in (weight, codes))
    scale = ((rows * whole).sum(1) / whole.square().sum(1).clamp_min(1)).abs()
    scale = torch.where(scale > 0, scale, 1.0)  # a channel of zeros
    if ((rows / scale[:, None] - whole * torch.sign((rows * whole).sum(1))[:, None]).abs() > 0.01).any():
        return None
    return [
        {"axis": axis, "scale": np.array(one, np.float32), "zero_point": np.array(0, np.int8)} for one in scale.tolist()
    ]


def _quantize(model: nn.Module, source: Path, target: Path, images: Tensor | None, reduce_range: bool) -> None:
    try:
        import onnx
        from onnxruntime import quantization as tools
    except ImportError as error:
        raise ExportError(
            "int8 export needs onnx, and onnxruntime with its quantization tools. Try: pip install hf-compress[export]"
        ) from error
    graph = onnx.load(source).graph
    weights = _weights_in(model, graph)
    kept = {weights[path][0] for path in _float_layers(model) & weights.keys()}
    left = [node.name for node in graph.node if kept.intersection(node.input)] + _behind_the_weights(graph)
    shared = {
        "per_channel": True,
        "weight_type": tools.QuantType.QInt8,
        "reduce_range": reduce_range,
        "nodes_to_exclude": left,
    }
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # the tools advise on the root logger
    try:
        if images is None:
            tools.quantize_dynamic(source, target, op_types_to_quantize=["MatMul", "Gemm"], **shared)
            return

        calibration = images.split(32)

        class Reader(tools.CalibrationDataReader):  # type: ignore[misc, name-defined]
            parts = iter(calibration)

            def get_next(self) -> dict[str, Any] | None:
                part = next(self.parts, None)
                return None if part is None else {"pixel_values": part.numpy()}

        tools.quantize_static(
            source,
            target,
            Reader(),
            quant_format=tools.QuantFormat.QDQ,
            activation_type=tools.QuantType.QUInt8,
            extra_options={"TensorQuantOverrides": _own_grids(model, graph, weights, reduce_range)},
            **shared,
        )
    except Exception as error:
        raise ExportError(
            f"ONNX Runtime could not quantize the model ({type(error).__name__}: {str(error)[:200]}). Export it in float "
            "with export_onnx."
        ) from error
    finally:
        root.setLevel(level)
