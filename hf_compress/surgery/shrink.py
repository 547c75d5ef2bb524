"""Cut a model down to a plan, in place, and note in a record what was done."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.axes import AxisGraph, example_inputs_for, find_axes
from hf_compress.axes.caches import drop_caches
from hf_compress.axes.finding import Inputs
from hf_compress.axes.graph import Rescale
from hf_compress.errors import PlanError

from .importance import Batches, check_method, importance
from .plan import Plan
from .select import Budget, select
from .shift import fold_shift as fold
from .shift import log_reports
from .skeleton import (
    PartialShape,
    Record,
    Shape,
    child_name,
    derived_attributes,
    derived_changes,
    group_count,
    local_shapes,
    named_tensors,
    record_of,
    replace_tensor,
    with_item_type,
    without_followers,
)


def shrink(
    model: nn.Module,
    plan: Plan,
    *,
    axes: AxisGraph | None = None,
    fold_shift: bool = False,
    example_inputs: Inputs = None,
) -> nn.Module:
    """Remove the indices that a plan does not keep, in place.

    For every exact axis the result computes, to rounding, what the dense model computes with the removed indices set
    to zero at their producers. Class, dtype, device and ``requires_grad`` are kept, shared parameters stay shared, and
    sizes that modules hold (``num_heads``, ``in_channels``, ``normalized_shape``) follow. Parameters become new objects:
    make optimizers afterwards.

    A model of transformers then carries the record of the change in its own copy of the configuration, so that
    ``save_pretrained`` and ``from_pretrained`` work; any other module holds it as ``hf_compress_record``.

    Args:
        model: the model that the plan was selected on, or one of the same architecture and sizes.
        plan: which indices every axis keeps.
        axes: the model's axes; those that the plan was made on when not given, else found again.
        fold_shift: carry the constants that removed BatchNorm channels would still have emitted (their shifts) into
            the layers that read them. What could not be carried exactly is logged and listed in
            ``model.hf_compress_shift_report``.
        example_inputs: for ``fold_shift``, and for finding the axes; built from the configuration when not given.

    Returns:
        ``model``.

    Raises:
        PlanError: when the plan does not fit the model; the model is then unchanged.
        ModelError: when the model is quantized by another method, or cannot be run.
    """
    earlier = record_of(model)
    axes = plan.axes if axes is None else axes
    axes = find_axes(model, example_inputs) if axes is None else axes  # an empty graph is one
    _check_fit(model, plan, axes)
    if fold_shift:
        if example_inputs is None and getattr(model, "config", None) is not None:
            example_inputs = example_inputs_for(model)
        without_bias = {path for path, module in model.named_modules() if getattr(module, "bias", 0) is None}
        reports = fold(model, plan, axes, example_inputs)
        log_reports(reports)
        biases = tuple(sorted(path for path in without_bias if model.get_submodule(path).bias is not None))
        model.hf_compress_shift_report = reports  # type: ignore[assignment]
    else:
        biases = ()
    cut = _cut(model, plan, axes, biases)
    attach_record(model, (earlier or Record()).merge(Record(cut.shapes, cut.attributes, biases)))
    return model


def prune(
    model: nn.Module,
    *,
    scores: str | Mapping[str, Tensor] = "magnitude",
    batches: Batches = None,
    macs: Budget = None,
    params: Budget = None,
    latency: float | None = None,
    ratio: float | Mapping[str, float] | None = None,
    round_to: int = 1,
    min_keep: int = 1,
    inexact: bool = False,
    fold_shift: bool = False,
    example_inputs: Inputs = None,
) -> nn.Module:
    """Find axes, choose under a budget, and shrink, in place.

    Args:
        model: a model of transformers, or any module together with ``example_inputs``.
        scores: a method of :func:`hf_compress.importance` ("magnitude", "group_norm", "taylor", "fisher", "random"), or
            axis name -> score of every index (a callback's ``scores(model)``).
        batches: for "taylor" and "fisher": batches with labels, as a ``DataLoader`` gives them.
        macs, params, latency, ratio, round_to, min_keep, inexact: see :func:`hf_compress.select`; half of the MACs when no
            budget is given. For a ``latency``, operators are timed on this machine (see :class:`LatencyTable`).
        fold_shift, example_inputs: see :func:`hf_compress.shrink`.

    Returns:
        ``model``.

    Raises:
        NothingToShrinkError, BudgetError, PlanError, MethodError, DataError, ModelError: before the model is changed.
    """
    if macs is None and params is None and latency is None and ratio is None:
        macs = 0.5
    record_of(model)  # refuses a foreign quantization before time is spent
    if isinstance(scores, str):
        check_method(scores, batches)
    axes = find_axes(model, example_inputs)
    if isinstance(scores, str):
        scores = importance(model, axes, method=scores, batches=batches)
    table = None
    if latency is not None:
        from hf_compress.measurement.latency_table import LatencyTable  # which knows plans

        table = LatencyTable.for_model(model, axes, example_inputs)
    plan = select(
        axes,
        scores,
        macs=macs,
        params=params,
        latency=latency,
        latency_table=table,
        ratio=ratio,
        round_to=round_to,
        min_keep=min_keep,
        inexact=inexact,
    )
    return shrink(model, plan, fold_shift=fold_shift, example_inputs=example_inputs)


# -- cutting ------------------------------------------------------------------------------------------------------


def _check_fit(model: nn.Module, plan: Plan, axes: AxisGraph) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model)}
    for name, expected in axes.parameter_dims.items():
        if shapes.get(name) != expected:
            found = f"has shape {shapes[name]}" if name in shapes else "does not exist"
            raise PlanError(
                f"the axes do not belong to this {type(model).__name__}: {name!r} {found}, the axes say {expected}. "
                "Select on the model as it is now, with find_axes(model)."
            )
    plan.check(axes)


def _cut(model: nn.Module, plan: Plan, axes: AxisGraph, new_biases: Sequence[str]) -> Record:
    """Slice every tensor and set every attribute; returns what changed, without what follows from the shapes.

    ``new_biases`` names layers whose bias the axes do not know: it follows the first dimension of their weight.
    """
    stand_ins = {child_name(path, "bias"): (child_name(path, "weight"), 0) for path in new_biases}
    masks = plan.masks(axes)
    tensors = dict(named_tensors(model))
    aliases: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        aliases.setdefault(id(tensor), []).append(name)
    modules = dict(model.named_modules(remove_duplicate=False))
    before = {path: local_shapes(module) for path, module in modules.items()}

    rescales: dict[str, list[Rescale]] = {}
    for rescale in axes.rescales:
        rescales.setdefault(rescale.parameter, []).append(rescale)
    shapes: dict[str, PartialShape] = {}
    for names in aliases.values():
        known = next((name for name in names if name in axes.parameter_dims or name in stand_ins), None)
        if known is None:
            continue
        old = tensors[known]
        whole = old.detach()
        new = _rescaled(whole, rescales.get(stand_ins.get(known, (known, 0))[0], ()), plan.sizes)
        for dim in range(old.dim()):
            mask = axes.keep_mask(*stand_ins.get(known, (known, dim)), masks)
            if not bool(mask.all()):
                new = new.index_select(dim, mask.nonzero().flatten().to(new.device))
        if new is not whole:
            replace_tensor(modules, names, new)
        if new.shape != old.shape:
            differs = tuple(now if now != was else None for now, was in zip(new.shape, old.shape, strict=True))
            shapes.update(dict.fromkeys(names, differs))

    attributes: dict[str, dict[str, int | Shape]] = {}
    settings: list[tuple[str, str, Any]] = []
    for law in axes.attributes:
        held = getattr(modules[law.module], law.name)
        value = law.law(plan.sizes)
        if law.index is None:
            changed: Any = value
        else:
            pending = attributes.get(law.module, {}).get(law.name)
            items = list(pending if isinstance(pending, tuple) else held)
            items[law.index] = value
            changed = tuple(items)
        if changed != (tuple(held) if isinstance(changed, tuple) else held):
            attributes.setdefault(law.module, {})[law.name] = changed
            settings.append((law.module, law.name, with_item_type(held, changed)))
    for path in sorted({name.rpartition(".")[0] for name in shapes} | set(attributes)):
        module = modules[path]
        groups = group_count(module)
        derived: dict[str, int | Shape] = {}
        if groups is not None:
            now = attributes.get(path, {}).get("groups", groups)
            derived = derived_changes(
                module,
                derived_attributes(module, before[path], groups),
                derived_attributes(module, local_shapes(module), now if isinstance(now, int) else groups),
            )
        settings += [(path, name, with_item_type(getattr(module, name), value)) for name, value in derived.items()]
        for name in derived:  # replay derives them as well
            attributes.get(path, {}).pop(name, None)
    for path, name, value in settings:
        setattr(modules[path], name, value)
    for module in modules.values():
        drop_caches(module)
    return Record(shapes, {path: values for path, values in attributes.items() if values})


def _rescaled(tensor: Tensor, rescales: Sequence[Rescale], sizes: Mapping[str, int]) -> Tensor:
    """A tensor with the rows multiplied that make up for factors which the forward pass computes from sizes."""
    for rescale in rescales:
        factor = rescale.factor(sizes)
        if factor != 1.0:
            column = torch.ones(tensor.shape[rescale.dim], dtype=torch.float64)
            column[rescale.positions] = factor
            shape = [-1 if dim == rescale.dim else 1 for dim in range(tensor.dim())]
            tensor = tensor * column.to(tensor.device, tensor.dtype).view(shape)
    return tensor


def attach_record(model: nn.Module, record: Record) -> None:
    """Let a model carry its record: in its own copy of the configuration, or as an attribute where it has none."""
    if not record:
        return
    record = without_followers(model, record)
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        model.hf_compress_record = record  # type: ignore[assignment]
        return
    own = copy.deepcopy(config)  # another model may have been built from the same configuration object
    held = getattr(own, "quantization_config", None) or {}
    others = {name: value for name, value in dict(held).items() if name == "storage"}
    own.quantization_config = {"quant_method": "hf_compress", "record": record.to_json(), **others}
    for module in model.modules():
        if vars(module).get("config") is config:
            module.config = own
