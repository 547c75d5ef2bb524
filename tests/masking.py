"""The law that all pruning obeys, in its plainest form: a cut model computes what the masked dense model computes.

The masking and the cutting here know nothing of ``hf_compress.surgery``; they follow the axis graph to the letter.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from hf_compress.axes import AxisGraph


def logits(output: object) -> Tensor:
    return output.logits if hasattr(output, "logits") else output


def tensors_of(output: object) -> Iterator[Tensor]:
    """Every tensor in what a model returned, in order: outputs of models are nested tuples and mappings."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for item in output.values():
            yield from tensors_of(item)
    elif isinstance(output, (tuple, list)):
        for item in output:
            yield from tensors_of(item)


def largest_difference(got: object, expected: object) -> float:
    """The largest difference of two nested outputs, each tensor relative to its largest expected value.

    Infinite where they disagree about structure, shapes, whole numbers or which values are not finite.
    """
    pairs = list(zip(tensors_of(got), tensors_of(expected), strict=True))
    worst = 0.0
    for a, b in pairs:
        if a.shape != b.shape or (not b.is_floating_point() and not torch.equal(a, b)):
            return float("inf")
        finite = b.isfinite()
        if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()) or not a[finite].isfinite().all():
            return float("inf")
        if finite.any():
            a, b = a[finite].double(), b[finite].double()
            worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp_min(1e-30)))
    return worst


def zero_at_producers(model: nn.Module, graph: AxisGraph, keep: dict[str, Tensor]) -> nn.Module:
    """Mask: every removed index is zero at every producer."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for axis in graph:
            for member in axis.producers if axis.name in keep else ():
                gone = member.positions[~keep[axis.name]].flatten()
                tensors[member.parameter].index_fill_(member.dim, gone, 0.0)
    return model


def cut(model: nn.Module, graph: AxisGraph, keep: dict[str, Tensor]) -> nn.Module:
    """The plainest possible surgery: slice every tensor, set every attribute that the graph names."""
    sizes = {name: int(mask.sum()) for name, mask in keep.items()}
    with torch.no_grad():
        for rescale in graph.rescales:
            rows = model.get_parameter(rescale.parameter)
            rows.index_copy_(
                rescale.dim,
                rescale.positions,
                rows.index_select(rescale.dim, rescale.positions) * rescale.factor(sizes),
            )
    new_tensors: dict[int, Tensor] = {}
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    shared = {}
    for name, tensor in named:
        if name in graph.parameter_dims:
            shared[id(tensor)] = name
    for name, tensor in named:
        masks = [graph.keep_mask(shared[id(tensor)], dim, keep) for dim in range(tensor.dim())]
        if all(bool(mask.all()) for mask in masks):
            continue
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        if id(tensor) not in new_tensors:
            sliced = tensor.detach()
            for dim, mask in enumerate(masks):
                sliced = sliced.index_select(dim, mask.nonzero().flatten())
            is_parameter = isinstance(tensor, nn.Parameter)
            new_tensors[id(tensor)] = nn.Parameter(sliced, tensor.requires_grad) if is_parameter else sliced
        setattr(module, last, new_tensors[id(tensor)])
    for rule in graph.attributes:
        module = model.get_submodule(rule.module)
        value = rule.law(sizes)
        if rule.index is not None:
            whole = list(getattr(module, rule.name))
            whole[rule.index] = value
            value = type(getattr(module, rule.name))(whole)
        setattr(module, rule.name, value)
    for module in model.modules():  # what follows from a weight's shape; caches of an earlier forward pass go
        for name, value in vars(module).items():
            if isinstance(value, dict) and not name.startswith("_") and all(type(v) is Tensor for v in value.values()):
                value.clear()
        shape = tuple(getattr(getattr(module, "weight", None), "shape", ()))
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            module.normalized_shape = shape or module.normalized_shape
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            module.num_features = shape[0] if shape else module.num_features
        elif isinstance(module, nn.Linear):
            module.out_features, module.in_features = shape
        elif isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
            module.out_channels, module.in_channels = shape[0], shape[1] * module.groups
    return model


def random_keep(graph: AxisGraph, seed: int, share: float = 0.3, inexact: bool = False) -> dict[str, Tensor]:
    """Remove a share of every exact axis, or of every axis, at least one index; tied axes keep equally many."""
    draw = random.Random(seed)
    held = {name for tied in graph.sizes_tied for name in tied if not all(graph[n].is_exact for n in tied)}
    keep = {}
    for axis in graph:
        if axis.size > 1 and (inexact or (axis.is_exact and axis.name not in held)):
            mask = torch.ones(axis.size, dtype=torch.bool)
            mask[draw.sample(range(axis.size), max(1, int(share * axis.size)))] = False
            keep[axis.name] = mask
    return keep


def assert_close(got: Tensor, expected: Tensor, relative: float = 1e-9) -> None:
    """Equal to ``relative`` of the largest expected value: deep random networks reach large numbers."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= relative * max(1.0, float(expected.abs().max()))


def assert_cut_equals_masked(model: nn.Module, graph: AxisGraph, keep: dict[str, Tensor], *inputs: Tensor) -> nn.Module:
    """The law. Also: the comparison proves something (masking changed the output), and parameters are counted right."""
    with torch.no_grad():
        dense = logits(copy.deepcopy(model)(*inputs))  # a copy, for models that cache what they made of parameters
        expected = logits(zero_at_producers(copy.deepcopy(model), graph, keep)(*inputs))
        small = cut(copy.deepcopy(model), graph, keep)
        assert_close(logits(small(*inputs)), expected)
    assert not torch.allclose(expected, dense), "pruning changed nothing, so the comparison proves nothing"
    cost = graph.cost({name: int(mask.sum()) for name, mask in keep.items()})
    assert cost.params == sum(p.numel() for p in small.parameters())
    return small
