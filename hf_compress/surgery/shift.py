"""The constants that removed channels would still have emitted.

A BatchNorm channel whose scale is zero still emits its shift, and the activation behind it a constant. Removing the
channel loses that constant unless its contribution to the layer that reads it is carried into that layer's bias, or
into the running mean of the BatchNorm behind that layer. This is exact for a linear layer and for a convolution
without zero padding. With zero padding the dense layer sees zeros in place of the constant at the borders, and one
number cannot stand for all positions: their mean is carried over, and the difference is measured and reported.

The function that is preserved: every removed index masked to zero at its producers, except for the shifts of
normalisation layers, which stay.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_compress.axes import Axis, AxisGraph, Contraction, Member
from hf_compress.axes.finding import run_model
from hf_compress.axes.tracing import tensors_in
from hf_compress.errors import ModelError

from .plan import Plan

logger = logging.getLogger(__name__)

Inputs = Tensor | Mapping[str, Tensor] | Sequence[Tensor]


@dataclass(frozen=True)
class ShiftReport:
    """What became of the constants that one layer read from removed indices.

    Attributes:
        consumer: the layer.
        axes: the axes whose removed indices it read.
        is_folded: whether their contribution was carried into the layer's bias or the norm behind it.
        is_exact: whether that preserves the function; False where zero padding makes the borders differ, and where
            nothing could be folded.
        largest_constant: largest absolute value read from a removed index; NaN when it was not observed.
        max_abs_difference: of the whole model's outputs, between the dense model with the removed indices masked
            (shifts kept) and the model after folding, on random probe inputs. The same in all reports of one call; NaN
            when the model was not run.
        reason: why it is not exact; empty when it is.
    """

    consumer: str
    axes: tuple[str, ...]
    is_folded: bool
    is_exact: bool
    largest_constant: float
    max_abs_difference: float
    reason: str = ""


def fold_shift(model: nn.Module, plan: Plan, axes: AxisGraph, example_inputs: Inputs | None) -> list[ShiftReport]:
    """Carry the constants of removed indices into the layers that read them, before these indices are cut.

    Only biases and running means of reading layers change; a layer without either gets a bias. The model is meant to
    be cut right after: until then it counts the constants twice.

    Args:
        model: the dense model. It is run twice, in evaluation mode and without gradients.
        plan: which indices go.
        axes: the graph of ``model``.
        example_inputs: inputs as for :func:`hf_compress.find_axes`; only shapes are used, values are random. None when
            unknown: nothing is folded then, and the reports say so.

    Returns:
        One report for each layer that reads a constant other than zero. Empty when there is none.

    Raises:
        ModelError: when the model fails on the probe inputs.
    """
    masks = plan.masks(axes)
    emitting = {name for name in plan.keep if _emits(model, axes[name], masks[name], axes)}
    readers = {(item.weight, item.dim): item for item in axes.contractions if emitting & set(item.axis_names)}
    reports = _unfoldable(axes, emitting, readers)
    if example_inputs is None:
        reports += [_report(item, emitting, obstacle="no example inputs to observe it on") for item in readers.values()]
    if example_inputs is None or not (reports or readers):
        return reports
    probe = _probe(example_inputs)
    watches = [_Watch(model, item, ~axes.keep_mask(item.weight, item.dim, masks)) for item in readers.values()]
    producers = {member.parameter for name in masks for member in axes[name].producers}
    with _evaluating(model):
        with _restored(model, producers):
            zero_producers(model, axes, masks, keep_shifts=True)
            hooks = [watch.hook() for watch in watches]
            try:
                expected = _run_probe(model, probe)
            finally:
                for hook in hooks:
                    hook.remove()
        watches = [watch for watch in watches if watch.largest != 0]  # zeros need no carrying; NaN is not zero
        edits = [(_target(model, watch.contraction), watch.contribution()) for watch in watches if watch.can_fold]
        with _restored(model, producers | {name for (name, _), _ in edits}):
            _add(model, edits)
            zero_producers(model, axes, masks)
            difference = _largest_difference(expected, _run_probe(model, probe))
        _add(model, edits)
    reports = [replace(report, max_abs_difference=difference) for report in reports]
    return reports + [_report(watch.contraction, emitting, watch, difference) for watch in watches]


_ROUNDED_AWAY = 1e-6  # of logits, which are of the order of 1 to 10


def log_reports(reports: Sequence[ShiftReport]) -> None:
    """One line: at level info when everything was folded exactly, or to what float32 rounds away; else a warning."""
    if not reports:
        return
    inexact = [report for report in reports if not report.is_exact]
    if not inexact or max(report.max_abs_difference for report in inexact) < _ROUNDED_AWAY:
        logger.info("constants of removed channels were folded into %d layers.", len(reports))
        return
    logger.warning(
        "%d of %d layers that read removed channels could not take over their constants exactly (%s); outputs on noise "
        "differ by at most %.3g. See model.hf_compress_shift_report.",
        len(inexact), len(reports), ", ".join(sorted({report.reason for report in inexact})),
        max(report.max_abs_difference for report in inexact),
    )  # fmt: skip


# -- masking ------------------------------------------------------------------------------------------------------


def shifts_of(axis: Axis, axes: AxisGraph) -> tuple[Member, ...]:
    """The producers that are shifts of a normalisation: one-dimensional biases beside a one-dimensional weight."""
    producers = {member.parameter for member in axis.producers}
    found = []
    for member in axis.producers:
        path, _, name = member.parameter.rpartition(".")
        weight = f"{path}.weight" if path else "weight"
        if name == "bias" and weight in producers and len(axes.parameter_dims[weight]) == 1:
            found.append(member)
    return tuple(found)


def zero_producers(model: nn.Module, axes: AxisGraph, masks: Mapping[str, Tensor], keep_shifts: bool = False) -> None:
    """Set every removed index to zero at its producers, in place.

    Args:
        masks: axis name -> bool [axis size], true where an index is kept.
        keep_shifts: leave the shifts of normalisation layers as they are.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}  # a frozen norm's shift is a buffer
    with torch.no_grad():
        for name, mask in masks.items():
            axis = axes[name]
            spared = {id(member) for member in shifts_of(axis, axes)} if keep_shifts else set()
            for member in axis.producers:
                if id(member) not in spared:
                    tensor = tensors[member.parameter]
                    gone = member.positions[~mask].flatten().to(tensor.device)
                    tensor.data.index_fill_(member.dim, gone, 0)


@contextmanager
def _restored(model: nn.Module, names: set[str]) -> Iterator[None]:
    """Parameters and buffers of these names get their values back at the end."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    saved = {name: tensors[name].detach().clone() for name in names}
    try:
        yield
    finally:
        for name, values in saved.items():
            tensors[name].data.copy_(values)


# -- what removed indices emit ------------------------------------------------------------------------------------


def _emits(model: nn.Module, axis: Axis, mask: Tensor, axes: AxisGraph) -> bool:
    """Whether removed indices of an axis can reach a reader as something other than zero."""
    if bool(mask.all()):
        return False
    if "offset" in axis.reasons:
        return True  # an activation that does not map zero to zero
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    gone = [tensors[m.parameter].detach()[m.positions[~mask].flatten()] for m in shifts_of(axis, axes)]
    return any(bool(values.any()) for values in gone)


def _unfoldable(
    axes: AxisGraph, emitting: set[str], readers: Mapping[tuple[str, int], Contraction]
) -> list[ShiftReport]:
    """Reports for readers that are neither a linear layer nor a convolution (a matmul, a transposed convolution)."""
    found: dict[str, set[str]] = {}
    for name in emitting:
        axis = axes[name]
        producers = {(member.parameter, member.dim) for member in axis.producers}
        for member in axis.members:
            key = (member.parameter, member.dim)
            # buffers and one-dimensional parameters go with the axis; what sums over it is at least a matrix
            if len(axes.parameter_dims[member.parameter]) > 1 and key not in producers and key not in readers:
                found.setdefault(member.parameter.rpartition(".")[0], set()).add(name)
    nan = float("nan")
    return [
        ShiftReport(module, tuple(sorted(names)), False, False, nan, nan, "neither a linear layer nor a convolution")
        for module, names in found.items()
    ]


class _Watch:
    """Observes what one layer reads from the removed indices.

    Args:
        removed: bool [size of the weight's summed dimension]; the same in every group of a grouped convolution.
    """

    def __init__(self, model: nn.Module, contraction: Contraction, removed: Tensor):
        self.contraction = contraction
        self.removed = removed
        self.module: Any = model.get_submodule(contraction.module)
        self.constants: Tensor | None = None  # [groups * number removed]
        self.read: Tensor | None = None  # [groups * number removed, everything else as in the input]
        self.obstacle = ""
        self.at_borders = contraction.has_padding
        if not isinstance(self.module, (nn.Linear, nn.modules.conv._ConvNd)) or (
            contraction.weight.rpartition(".")[0] != contraction.module
        ):
            self.obstacle = "neither a linear layer nor a convolution"
        # a subclass may pad by itself, which the layer's own settings do not show
        self.may_pad = type(self.module).forward not in (
            nn.Linear.forward,
            nn.Conv1d.forward,
            nn.Conv2d.forward,
            nn.Conv3d.forward,
        )

    def hook(self) -> Any:
        return self.module.register_forward_pre_hook(lambda module, inputs: self._observe(inputs[0]))

    def _observe(self, x: Tensor) -> None:
        if self.obstacle:
            return
        dim = x.dim() - 1 if isinstance(self.module, nn.Linear) else x.dim() - self.module.weight.dim() + 1
        removed = self.removed.repeat(getattr(self.module, "groups", 1))
        read = x.detach().movedim(dim, 0)[removed.to(x.device)]
        values = read.flatten(1)  # [removed, everything else]
        constants = values[:, values.shape[1] // 2]
        # the same constant through a vectorised activation can differ in its last bits from lane to lane
        close = torch.isclose(values, constants[:, None], rtol=1e-5, atol=1e-7)
        if not bool(close.all()):
            if isinstance(self.module, nn.Linear) or not bool((close | (values == 0)).all()):
                self.obstacle = "what it reads from removed indices is not constant"
                return
            self.at_borders = True
        if self.constants is not None and not torch.allclose(self.constants, constants, rtol=1e-5, atol=1e-7):
            self.obstacle = "it is called several times on different constants"
            return
        self.constants, self.read = constants, read
        self.at_borders = self.at_borders or (self.may_pad and not isinstance(self.module, nn.Linear))

    @property
    def largest(self) -> float:
        """Largest absolute constant; NaN when none was observed."""
        return float("nan") if self.constants is None else float(self.constants.abs().max())

    @property
    def can_fold(self) -> bool:
        return not self.obstacle and self.constants is not None

    def contribution(self) -> Tensor:
        """What the constants add to the layer's output, averaged over its positions: [outputs].

        Without padding all positions are equal. With it, the mean is the one number per output that differs least, in
        squares, from what the dense layer adds; a small map is mostly border, and its interior says little about it.
        """
        assert self.constants is not None and self.read is not None
        weight = self.module.weight.detach()[:, self.removed.to(self.module.weight.device)]
        if weight.dim() == 2:
            return weight @ self.constants
        spatial, groups = tuple(range(2, weight.dim())), self.module.groups
        if self.module.padding_mode != "zeros" or self.module.transposed:
            per_group = weight.sum(spatial).unflatten(0, (groups, -1)) @ self.constants.reshape(groups, -1, 1)
            return per_group.flatten()
        read = self.read.reshape(len(self.read), -1, *self.read.shape[-len(spatial) :]).mean(1)[None]
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(spatial) - 1]
        added = convolve(read, weight, None, self.module.stride, self.module.padding, self.module.dilation, groups)
        return added.mean((0, *spatial))


def _report(
    contraction: Contraction,
    emitting: set[str],
    watch: _Watch | None = None,
    difference: float = float("nan"),
    obstacle: str = "",
) -> ShiftReport:
    obstacle = obstacle or (watch.obstacle if watch else "")
    if watch is not None and watch.constants is None and not obstacle:
        obstacle = "it was not called on the probe inputs"
    at_borders = watch is not None and watch.at_borders
    return ShiftReport(
        consumer=contraction.module,
        axes=tuple(sorted(emitting & set(contraction.axis_names))),
        is_folded=not obstacle,
        is_exact=not obstacle and not at_borders,
        largest_constant=watch.largest if watch else float("nan"),
        max_abs_difference=difference,
        reason=obstacle or ("zero padding at the borders" if at_borders else ""),
    )


# -- carrying it over ---------------------------------------------------------------------------------------------

_Edit = tuple[tuple[str, int], Tensor]  # ((tensor, sign), what to add to it)


def _target(model: nn.Module, contraction: Contraction) -> tuple[str, int]:
    """The tensor that takes the constant, and its sign; a layer with neither bias nor norm gets a bias of zeros."""
    module: Any = model.get_submodule(contraction.module)
    prefix = f"{contraction.module}." if contraction.module else ""
    if module.bias is None:
        norm = model.get_submodule(contraction.norm) if contraction.norm is not None else None
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            return f"{contraction.norm}.running_mean", -1
        zeros = module.weight.new_zeros(module.weight.shape[0])
        module.bias = nn.Parameter(zeros, requires_grad=module.weight.requires_grad)
    return f"{prefix}bias", 1


def _add(model: nn.Module, edits: Sequence[_Edit]) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for (name, sign), amount in edits:
            tensors[name].data.add_(amount.to(tensors[name].dtype), alpha=sign)


# -- running the model --------------------------------------------------------------------------------------------


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _probe(inputs: Inputs) -> Any:
    """Random values in the shapes of the example inputs, two examples at least; the random state is left alone."""
    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not tensor.dim():
            return tensor
        shape = (max(2, tensor.shape[0]), *tensor.shape[1:])
        return torch.randn(shape, generator=generator).to(tensor)

    if isinstance(inputs, Tensor):
        return noise(inputs)
    if isinstance(inputs, Mapping):
        return {name: noise(tensor) for name, tensor in inputs.items()}
    return tuple(noise(tensor) for tensor in inputs)


def _run_probe(model: nn.Module, probe: Any) -> list[Tensor]:
    try:
        output = run_model(model, probe)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} failed on random inputs in the shapes of example_inputs ({type(error).__name__}: "
            f"{error}). Pass example_inputs that the model accepts, or fold_shift=False."
        ) from error
    return list(tensors_in(dict(output) if isinstance(output, Mapping) else output))


def _largest_difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    differences = [float((a - b).abs().max()) for a, b in zip(expected, found, strict=True) if a.is_floating_point()]
    return max(differences, default=float("nan"))
