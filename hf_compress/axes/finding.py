"""``find_axes``: run the model once, watch it, and turn what was seen into an :class:`~.graph.AxisGraph`."""

from __future__ import annotations

import inspect
import random
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.errors import ModelError

from . import fourier, rules  # noqa: F401  (importing them fills the table of rules)
from .algebra import (
    Index,
    Polynomial,
    add_into,
    concatenation,
    find,
    fixed,
    flag,
    freeze,
    is_fixed,
    leaves,
    multiply,
    positions,
    product,
    size_polynomial,
    unify,
)
from .attributes import HEAD_COUNT_ATTRIBUTES
from .caches import held_dicts, is_cache
from .graph import AttributeLaw, Axis, AxisGraph, Contraction, Member, Rescale, SizeFactor, SizeLaw
from .provenance import AttributeKey, Expression, TracedInt, evaluate, origins, traced_attributes, watched_mathematics
from .scaling import Absorbed
from .tracing import Tracer, overlaps, tensors_in
from .twins import idle_paths, tie_idle

Inputs = Tensor | Mapping[str, Tensor] | Sequence[Tensor] | None

_SHAPE_ATTRIBUTES = {
    "in_features": 1, "out_features": 0, "in_channels": 1, "out_channels": 0, "num_features": 0, "normalized_shape": 0,
    "num_channels": 0, "embedding_dim": 1,
}  # fmt: skip
"""Attributes of standard layers that follow from the weight's shape: which dimension they measure."""


def is_standard(module: nn.Module) -> bool:
    """Whether a module is one of torch's own layers."""
    return type(module).__module__.startswith("torch.nn.")


def example_inputs_for(model: nn.Module) -> dict[str, Tensor]:
    """One blank image of the size that the model's configuration names.

    Returns:
        ``{"pixel_values": float [1, channels, height, width]}`` on the model's device and in its dtype.

    Raises:
        ModelError: when the model has no configuration that names an image size.
    """
    config = getattr(model, "config", None)
    size: Any = None
    channels: Any = None
    for holder in (config, getattr(config, "backbone_config", None), getattr(config, "vision_config", None)):
        size = size or getattr(holder, "image_size", None) or getattr(holder, "input_size", None)
        channels = channels or getattr(holder, "num_channels", None)
    timm_config = getattr(getattr(model, "timm_model", None), "pretrained_cfg", None)
    if isinstance(timm_config, Mapping) and timm_config.get("input_size"):
        timm_channels, *timm_size = timm_config["input_size"]
        size, channels = size or timm_size, channels or timm_channels
    if config is None:
        raise ModelError(
            f"{type(model).__name__} has no config, so its input is unknown; pass example_inputs, for example "
            "torch.zeros(1, 3, 224, 224)."
        )
    # convolutional configurations often name no size; any image will do for them
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:] if size else (224, 224)
    try:
        channels = int(channels or 3)
        parameter = next(p for p in model.parameters() if p.is_floating_point())
    except StopIteration:
        raise ModelError(f"{type(model).__name__} has no parameters, so there is nothing to shrink.") from None
    shape = (1, channels, int(height), int(width))
    return {"pixel_values": torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)}


def find_axes(model: nn.Module, example_inputs: Inputs = None) -> AxisGraph:
    """Find what can shrink in a model by watching one forward pass.

    The pass runs in evaluation mode without gradients, with noise in place of what large layers would compute (see
    :mod:`.shortcuts`); the model, its buffers, its mode and the random state are left as they were. Where some modules did
    not run in it, the pass that training makes is watched as well, for heads that only training uses.

    Args:
        model: any module that runs eagerly.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs. The first dimension counts
            examples and only the first example is run. Built from the model's configuration when not given.

    Raises:
        ModelError: when the model cannot be run on the inputs, or they disagree about the number of examples.

    Warns:
        UserWarning: once, naming every operator without a rule, whose axes stay whole.
    """
    if example_inputs is None:
        example_inputs = example_inputs_for(model)
    example_inputs = _one_example(example_inputs)
    tracer, output = _watch(model, example_inputs)
    if tracer.unexplained:  # what a function keeps from an earlier call is the same object again, and so a constant
        tracer, output = _watch(model, example_inputs, tracer.unexplained)
    _keep_outputs(tracer, output)
    if tracer.idle:
        _watch_training(model, tracer, example_inputs)
    tracer.twins = tie_idle(model, tracer)
    if tracer.without_rule:
        met = ", ".join(f"{name} (in {path or 'the model'})" for name, path in sorted(tracer.without_rule.items()))
        warnings.warn(f"no rule for: {met}; the axes they touch stay whole.", UserWarning, stacklevel=2)
    return _build(model, tracer)


def _watch(model: nn.Module, inputs: Any, constants: Sequence[Tensor] = ()) -> tuple[Tracer, Any]:
    """One watched forward pass; also what the model returned.

    Large products are not computed (see :mod:`.shortcuts`); a model that fails on their stand-ins runs once more as it is.
    """
    try:
        return _watched_pass(model, inputs, constants, in_full=False)
    except ModelError:
        return _watched_pass(model, inputs, constants, in_full=True)


def _watched_pass(model: nn.Module, inputs: Any, constants: Sequence[Tensor], in_full: bool) -> tuple[Tracer, Any]:
    tracer = Tracer(model, constants, in_full)
    with _prepared(model, tracer):
        for tensor in tensors_in(inputs):
            for dim in tracer.value(tensor).dims:
                dim.frozen = "model input"
        with tracer:
            return tracer, run_examples(model, inputs)


@contextmanager
def _prepared(model: nn.Module, tracer: Tracer) -> Iterator[None]:
    """What surrounds every watched pass: the model comes back as it was, and its integers are followed."""
    with (
        undisturbed(model),
        _uncompiled(),
        traced_attributes(model, tracer.watcher),
        watched_mathematics(),
        torch.no_grad(),
    ):
        yield


def _keep_outputs(tracer: Tracer, output: Any) -> None:
    """What a model returns keeps its shape."""
    for tensor in _outputs(output, set()):
        if tracer.knows(tensor):
            value = tracer.value(tensor)
            value.readers.append(("output", ""))
            tracer.gains.use(value.gain)
            for dim in value.dims:
                freeze(dim, "model output")


def _watch_training(model: nn.Module, tracer: Tracer, inputs: Any) -> None:
    """Watch the pass that training makes as well: heads that evaluation leaves out read axes too.

    Layers of torch itself stay in evaluation mode, so that no statistic of one example is needed. A model that only trains
    on labels stops somewhere on the way; what was seen up to there is true, and what was not read stays whole.
    """
    costs, contractions = len(tracer.costs), len(tracer.contractions)
    with _prepared(model, tracer):
        for module in model.modules():
            module.training = not (is_standard(module) or isinstance(module, nn.modules.batchnorm._NormBase))
        with tracer:
            try:
                output = run_model(model, inputs)
            except Exception:
                output = None
    _keep_outputs(tracer, output)
    del tracer.costs[costs:], tracer.contractions[contractions:]


def _outputs(output: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor in what a model returned, also inside plain objects."""
    if id(output) in seen:
        return
    seen.add(id(output))
    cache = getattr(sys.modules.get("transformers.cache_utils"), "Cache", None)
    if cache is not None and isinstance(output, cache):
        return  # keys and values for the model's own next call
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (tensor for item in output.values() for tensor in _outputs(item, seen))
    elif isinstance(output, (tuple, list, set)):
        yield from (tensor for item in output for tensor in _outputs(item, seen))
    elif hasattr(output, "__dict__") and not isinstance(output, (type, nn.Module)):
        yield from _outputs(vars(output), seen)


def _one_example(inputs: Any) -> Any:
    """The first example of a batch: costs are those of one example, and a batch of one cannot hide a broadcast."""
    tensors = tensors_in(inputs)
    batch = {int(tensor.shape[0]) for tensor in tensors if tensor.dim() > 1}
    if batch <= {1}:
        return inputs
    if len(batch) > 1:
        raise ModelError(
            f"the example inputs have first dimensions {sorted(batch)}, so it is not clear which one counts examples. "
            "Pass inputs for one example, with a first dimension of 1."
        )

    def first(nested: Any) -> Any:
        if isinstance(nested, Tensor):
            return nested[:1] if nested.dim() and int(nested.shape[0]) in batch else nested
        if isinstance(nested, Mapping):
            return {key: first(value) for key, value in nested.items()}
        return tuple(first(value) for value in nested) if isinstance(nested, (tuple, list)) else nested

    return first(inputs)


def run_model(model: nn.Module, inputs: Any) -> Any:
    """Call a model with a tensor, a tuple of positional inputs or a mapping of keyword inputs."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, Tensor):
        names = inspect.signature(model.forward).parameters
        return model(pixel_values=inputs) if next(iter(names), "") == "pixel_values" else model(inputs)
    return model(*inputs)


def run_examples(model: nn.Module, inputs: Any) -> Any:
    """:func:`run_model`, with a message that says what to do when the model fails.

    Raises:
        ModelError: naming the failure.
    """
    try:
        return run_model(model, inputs)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} failed on the example inputs ({type(error).__name__}: {error}). Pass example_inputs "
            "that the model accepts."
        ) from error


def _uncompiled() -> AbstractContextManager[None]:
    """Compiled modules run as they were written; nothing is loaded for it that no compiled module has loaded before."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


# transformers installs hooks in the first pass and remembers that in an attribute: both stay or both go
_RESTORED = ("_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks")


@contextmanager
def undisturbed(model: nn.Module) -> Any:
    """Evaluation mode for the duration; modes, attributes, caches, buffers and random states come back."""
    modules = list(model.modules())
    namespaces = [(vars(module), dict(vars(module))) for module in modules]
    containers = [
        (value, dict(value) if isinstance(value, dict) else list(value))
        for _, saved in namespaces
        for name, value in saved.items()
        if type(value) in (dict, list, OrderedDict) and (not name.startswith("_") or name in _RESTORED)
    ]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_meta]
    random_state, torch_state = random.getstate(), torch.get_rng_state()
    cuda_state = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    dicts = [held for module in modules for held in held_dicts(module)]
    containers += [(held, dict(held)) for held in dicts]
    for held in dicts:  # a tensor that an earlier evaluation cached would hide the parameter that it was made from
        if is_cache(held):
            held.clear()
    model.eval()
    try:
        yield
    finally:
        for namespace, saved in namespaces:
            for name in set(namespace) - set(saved):
                del namespace[name]
            namespace.update(saved)
        for container, content in containers:
            container.clear()
            container.update(content) if isinstance(container, dict) else container.extend(content)
        with torch.no_grad():
            for buffer, values in buffers:
                if not torch.equal(buffer, values):
                    buffer.copy_(values)
        random.setstate(random_state)
        torch.set_rng_state(torch_state)
        if cuda_state is not None:
            torch.cuda.set_rng_state_all(cuda_state)


# -- from the trace to the graph ----------------------------------------------------------------------------------


class _Ties:
    """Which attribute measures which dimensions, and which leaves must stay equal in size."""

    def __init__(self, model: nn.Module, tracer: Tracer):
        self.modules = dict(model.named_modules())
        self.tracer = tracer
        self.measured: dict[AttributeKey, list[Index]] = {}
        self.expressions: list[tuple[TracedInt, Index, str]] = []
        self.equal: list[tuple[Index, Index]] = []
        self.absorbed: list[Absorbed] = []

    def collect(self) -> None:
        for value, dim, module in self.tracer.ties:
            self._add(value, dim, module)
        for left, right in self.tracer.watcher.equal:
            for a, b in ((left, right), (right, left)):
                if isinstance(a.origin, AttributeKey) and isinstance(b.origin, Index):
                    self._add(a, b.origin, a.origin.module)
                    break
        for key in list(self.measured):
            for path in idle_paths(key.module, self.tracer.twins):
                self.measured[key._replace(module=path)] = list(self.measured[key])
        self.absorbed += self.tracer.gains.absorbed(lambda name: len(self.tracer.parameters[name].readers))
        for item in list(self.absorbed):
            self.absorbed += [item._replace(parameter=path) for path in idle_paths(item.parameter, self.tracer.twins)]
            for size, _ in item.factor:
                self._learn(size)
        for value in self.tracer.watcher.real:
            self._mark_scale(value)
        for key, dims in self.measured.items():
            for dim in dims[1:]:
                self._tie_sizes(dims[0], dim, key)
        for value, dim, _ in self.expressions:
            self._measure_quotient(value, dim)
            self._measure_difference(value, dim)
        self._check_expressions()

    def _measure_quotient(self, value: TracedInt, dim: Index) -> None:
        """``width // heads`` that measures a head measures the width too, where nothing else does."""
        origin = value.origin
        if not isinstance(origin, Expression) or origin.function is not int.__floordiv__:
            return
        left, right = (getattr(side, "origin", None) for side in (origin.left, origin.right))
        nodes = [right] if isinstance(right, Index) else self.measured.get(right, []) if right else []  # type: ignore[arg-type]
        if not nodes and not isinstance(right, Expression):
            nodes = [fixed(int(origin.right), "a constant")]
        if isinstance(left, AttributeKey) and not self.measured.get(left) and nodes:
            whole = product([nodes[0], dim])
            if whole.size == int(origin.left):
                self.measured[left] = [whole]

    def _measure_difference(self, value: TracedInt, dim: Index) -> None:
        """``width - part`` that measures the rest of a dimension measures the width too, where nothing else does."""
        origin = value.origin
        if not isinstance(origin, Expression) or origin.function is not int.__sub__:
            return
        left, right = (getattr(side, "origin", None) for side in (origin.left, origin.right))
        part = self.measured.get(right) if isinstance(right, AttributeKey) else None
        if isinstance(left, AttributeKey) and not self.measured.get(left) and part:
            self.measured[left] = [concatenation([part[0], dim])]

    def _add(self, value: TracedInt, dim: Index, module: str) -> None:
        if isinstance(value.origin, Index):
            unify(value.origin, dim)
        elif isinstance(value.origin, AttributeKey):
            self._dims_of(value.origin).append(dim)
        else:
            self.expressions.append((value, dim, module))
            self._learn(value)

    def _learn(self, value: int) -> None:
        for origin in origins(value):
            if isinstance(origin, AttributeKey):
                self._dims_of(origin)

    def _dims_of(self, key: AttributeKey) -> list[Index]:
        """The dimensions that an attribute measures; those of a standard layer measure its own parameters."""
        if key not in self.measured:
            self.measured[key] = []
            module = self.modules[key.module]
            weight = self.tracer.parameters.get(f"{key.module}.weight" if key.module else "weight")
            if weight is not None and is_standard(module) and key.name in _SHAPE_ATTRIBUTES:
                at = _SHAPE_ATTRIBUTES[key.name] if key.item is None else key.item
                if key.name.endswith("_channels") and getattr(module, "transposed", False):
                    at = 1 - at
                if at < len(weight.dims):
                    # with groups the weight counts fewer channels than the attribute: freezing is the safe answer
                    self.measured[key].append(weight.dims[at])
        return self.measured[key]

    def _mark_scale(self, value: int) -> None:
        for origin in origins(value):
            for node in [origin] if isinstance(origin, Index) else self._dims_of(origin):
                flag(node, "scale")

    def _tie_sizes(self, a: Index, b: Index, key: AttributeKey) -> None:
        a, b = find(a), find(b)
        if a is b:
            return
        if a.size != b.size:  # the attribute of a grouped layer counts what its weight does not
            for node in (a, b):
                freeze(node, f"measured by {key.module}.{key.name}")
        elif a.form == b.form == "atom" and not a.frozen and not b.frozen:
            self.equal.append((a, b))
        elif is_fixed(a) or is_fixed(b):
            for node in (a, b):
                freeze(node, f"measured by {key.module}.{key.name} together with a fixed dimension")
        else:
            unify(a, b)

    def size_groups(self) -> list[set[Index]]:
        groups: list[set[Index]] = []
        for a, b in self.equal:
            touched = {*leaves(a), *leaves(b)}
            joined = [group for group in groups if group & touched]
            groups = [group for group in groups if not group & touched]
            groups.append(touched.union(*joined))
        for group in groups:
            if any(leaf.frozen for leaf in group):
                for leaf in group:
                    freeze(leaf, "must keep the size of a fixed dimension")
        return [group for group in groups if len(group) > 1 and not any(leaf.frozen for leaf in group)]

    def _check_expressions(self) -> None:
        """Freeze a dimension whose integer does not follow it, and what the integer is made of; tested on random sizes."""
        draw = random.Random(0)
        pending = list(self.expressions)
        changed = True
        while changed:
            changed = False
            groups = self.size_groups()
            for expression in list(pending):
                value, dim, module = expression
                nodes = [dim]
                for origin in origins(value):
                    nodes += [origin] if isinstance(origin, Index) else self._dims_of(origin)
                if all(is_fixed(node) for node in nodes):
                    pending.remove(expression)
                elif not all(self._holds(value, dim, groups, draw) for _ in range(3)):
                    pair = self._missing_tie(value, dim, groups)
                    if pair is not None:
                        self.equal.append(pair)
                        groups = self.size_groups()
                    else:
                        for node in nodes:
                            freeze(node, f"integer arithmetic in the forward pass of {module or 'the model'}")
                    changed = True

    def _missing_tie(self, value: TracedInt, dim: Index, groups: list[set[Index]]) -> tuple[Index, Index] | None:
        """Two leaves that have to keep the same size for an integer to follow its dimension, if that is all it takes.

        ``width // heads`` measures the dimensions of a head; where it serves queries and values, those keep equally many.
        """
        asked, have = self._symbolic(value, groups), _renamed(size_polynomial(dim), groups)
        if asked is None or len(asked) != 1 or len(have) != 1:
            return None
        (left, a), (right, b) = next(iter(asked.items())), next(iter(have.items()))
        left, right = _without_each(left, right), _without_each(right, left)
        if a == b and len(left) == len(right) == 1 and left[0].size == right[0].size:
            return left[0], right[0]
        return None

    def _symbolic(self, value: int, groups: list[set[Index]]) -> Polynomial | None:
        """An integer as a polynomial in the sizes of leaves; None where it is none."""
        origin = value.origin if isinstance(value, TracedInt) else None
        if isinstance(origin, AttributeKey):
            nodes = self.measured.get(origin)
            origin = nodes[0] if nodes else None
        if isinstance(origin, Index):
            return _renamed(size_polynomial(origin), groups)
        if not isinstance(origin, Expression):
            return {(): int(value)}
        left, right = self._symbolic(origin.left, groups), self._symbolic(origin.right, groups)
        if left is None or right is None:
            return None
        if origin.function in (int.__add__, int.__sub__):
            total = dict(left)
            add_into(total, right, 1 if origin.function is int.__add__ else -1)
            return {monomial: coefficient for monomial, coefficient in total.items() if coefficient}
        if origin.function is int.__mul__:
            return multiply([left, right])
        if origin.function is int.__floordiv__ and len(right) == 1:
            (divisor, count), quotient = next(iter(right.items())), {}
            for monomial, coefficient in left.items():
                if count == 0 or coefficient % count or _without_each(divisor, monomial):
                    return None
                quotient[_without_each(monomial, divisor)] = coefficient // count
            return quotient
        return None

    def _holds(self, value: TracedInt, dim: Index, groups: list[set[Index]], draw: random.Random) -> bool:
        sizes: dict[Index, int] = {}

        def leaf_size(leaf: Index) -> int:
            if leaf.frozen:
                return leaf.size
            for group in groups:
                if leaf in group:
                    leaf = min(group, key=lambda item: item.serial)
            return sizes.setdefault(leaf, draw.randint(1, 997))

        def size(node: Index) -> int:
            node = find(node)
            if node.form == "atom":
                return leaf_size(node)
            parts = [size(part) for part in node.parts]
            result = 0 if node.form == "cat" else 1
            for part in parts:
                result = result + part if node.form == "cat" else result * part
            return result

        def attribute(key: AttributeKey, dense: int) -> int:
            nodes = self.measured.get(key)
            return size(nodes[0]) if nodes else dense

        try:
            return evaluate(value, attribute, size) == size(dim)
        except ZeroDivisionError:
            return False


def _renamed(polynomial: Polynomial, groups: list[set[Index]]) -> Polynomial:
    """A polynomial in which leaves that keep the same size are one."""
    result: Polynomial = {}
    for monomial, coefficient in polynomial.items():
        named = [min(group, key=_serial) for leaf in monomial for group in groups if leaf in group]
        named += [leaf for leaf in monomial if not any(leaf in group for group in groups)]
        add_into(result, {tuple(sorted(named, key=_serial)): coefficient})
    return result


def _serial(leaf: Index) -> int:
    return leaf.serial


def _without_each(monomial: tuple[Index, ...], divisor: tuple[Index, ...]) -> tuple[Index, ...]:
    """A monomial without the factors of another, as far as it has them."""
    rest = list(monomial)
    for leaf in divisor:
        if leaf in rest:
            rest.remove(leaf)
    return tuple(rest)


def _keep_unread(tracer: Tracer, groups: list[set[Index]]) -> None:
    """What no operator read keeps its shape, unless an attribute ties it to what one did."""
    unread, read = set[Index](), set[Index]()
    for value in tracer.parameters.values():
        (read if value.readers else unread).update(leaf for dim in value.dims for leaf in leaves(dim))
    for group in groups:
        if group & read:
            read |= group
    for leaf in unread - read:
        freeze(leaf, "parameter that the forward pass does not read")


def _build(model: nn.Module, tracer: Tracer) -> AxisGraph:
    ties = _Ties(model, tracer)
    ties.collect()
    _keep_unread(tracer, ties.size_groups())
    for summed, dirty in tracer.zero_checks:
        for leaf in set.intersection(*(overlaps(item, summed) for item in dirty)):
            leaf.flags |= {"offset"}
    consumed = tracer.consumed
    consumed |= {(path, dim) for name, dim in consumed for path in idle_paths(name, tracer.twins)}
    groups = ties.size_groups()

    members: dict[Index, list[Member]] = {}
    fixed_reasons: dict[str, int] = {}
    for name, value in tracer.parameters.items():
        for dim, node in enumerate(value.dims):
            found = positions(node)
            if not found and node.size > 1:
                reason = next((leaf.frozen for leaf in leaves(node) if leaf.frozen), "fixed") or "fixed"
                fixed_reasons[reason] = fixed_reasons.get(reason, 0) + 1
            for leaf, where in found.items():
                members.setdefault(leaf, []).append(Member(name, dim, torch.from_numpy(where.copy())))

    parameters = dict(model.named_parameters())
    parameter_names = set(parameters)
    float_parameters = {name for name, p in parameters.items() if p.is_floating_point()}
    floats = float_parameters | {name for name, b in model.named_buffers() if b.is_floating_point()}
    names = _names(members, consumed, float_parameters, _ranks(model, members))
    ordered = list(names)
    place = {leaf: i for i, leaf in enumerate(ordered)}
    labels, dense = [names[leaf] for leaf in ordered], [leaf.size for leaf in ordered]

    def law(polynomial: Polynomial) -> SizeLaw:
        constant: dict[tuple[int, ...], float] = {}
        for monomial, coefficient in polynomial.items():
            key, factor = [], float(coefficient)
            for leaf in monomial:
                if leaf in place:
                    key.append(place[leaf])
                else:  # touches no parameter, so it keeps its size
                    factor *= leaf.size
            constant[tuple(key)] = constant.get(tuple(key), 0.0) + factor
        return SizeLaw(labels, dense, list(constant.items()))

    macs: Polynomial = {}
    for term in tracer.costs:
        add_into(macs, multiply([size_polynomial(dim) for dim in term.dims]), int(term.coefficient))
    params: Polynomial = {}
    for name, value in tracer.parameters.items():
        if name in parameter_names:
            add_into(params, multiply([size_polynomial(dim) for dim in value.dims]))
    macs_law, params_law = law(macs), law(params)

    axes: dict[str, Axis] = {}
    scale_names = set(tracer.scales)
    scale_names |= {path for name in tracer.scales for path in idle_paths(name, tracer.twins)}
    for leaf in ordered:
        name = names[leaf]
        found_members = tuple(members[leaf])
        producers = tuple(m for m in found_members if m.parameter in floats and (m.parameter, m.dim) not in consumed)
        scales = tuple(m for m in found_members if m.parameter in scale_names and _has_one_number_each(m, tracer))
        axes[name] = Axis(
            name=name,
            size=leaf.size,
            members=found_members,
            producers=producers,
            scales=scales,
            is_exact=not leaf.flags,
            reasons=tuple(sorted(leaf.flags)),
            macs=macs_law({}) - macs_law({name: 0}),
            params=params_law({}) - params_law({name: 0}),
        )

    contractions = []
    for item in tracer.contractions:
        inside = tuple(dict.fromkeys(names[leaf] for leaf in leaves(item.summed) if leaf in names))
        readers = item.output.readers if item.output is not None else []
        norm = readers[0][1] if len(readers) == 1 and readers[0][0] == "batch_norm" else None
        if inside:
            contractions.append(Contraction(inside, item.module, item.weight, item.dim, item.has_padding, norm))

    return AxisGraph(
        axes=axes,
        fixed=fixed_reasons,
        attributes=tuple(_attribute_laws(model, ties, names, law, axes)),
        contractions=tuple(contractions),
        sizes_tied=tuple(tuple(sorted(names[leaf] for leaf in group if leaf in names)) for group in groups),
        parameter_dims={name: tuple(dim.size for dim in value.dims) for name, value in tracer.parameters.items()},
        without_rule=dict(tracer.without_rule),
        _macs=macs_law,
        _params=params_law,
        rescales=tuple(_rescales(ties, law)),
    )


def _rescales(ties: _Ties, law: Any) -> Iterator[Rescale]:
    """What surgery multiplies to make up for factors that change with the axes."""

    def size_law(value: int) -> Callable[[Mapping[str, int]], int]:
        origin = value.origin if isinstance(value, TracedInt) else None
        node = origin if isinstance(origin, Index) else None
        if isinstance(origin, AttributeKey) and ties.measured.get(origin):
            node = ties.measured[origin][0]
        if node is not None:
            return law(size_polynomial(node))
        if isinstance(origin, Expression):
            left, right = size_law(origin.left), size_law(origin.right)
            return lambda sizes: origin.function(left(sizes), right(sizes))
        return lambda sizes: int(value)

    for item in ties.absorbed:
        sizes = [(size, power) for size, power in item.factor if not _is_constant(size, ties)]
        if sizes:
            factor = SizeFactor([(size_law(size), power) for size, power in sizes])
            yield Rescale(item.parameter, item.dim, item.channels, factor)


def _is_constant(value: int, ties: _Ties) -> bool:
    nodes = [origin if isinstance(origin, Index) else ties.measured.get(origin) for origin in origins(value)]
    flat = [node for item in nodes if item for node in (item if isinstance(item, list) else [item])]
    return all(is_fixed(node) for node in flat)


def _has_one_number_each(member: Member, tracer: Tracer) -> bool:
    """Whether a parameter is one-dimensional and holds one number for each index of an axis.

    It may hold other numbers besides: the BatchNorm behind a concatenation scales several axes.
    """
    return len(tracer.parameters[member.parameter].dims) == 1 and member.positions.shape[1] == 1


def _ranks(model: nn.Module, members: dict[Index, list[Member]]) -> dict[Index, str]:
    """Path of the layer in two factors (a module with a ``rank``) for every leaf that only passes between these."""
    found = {}
    for leaf, where in members.items():
        paths = {member.parameter.rpartition(".")[0].rpartition(".")[0] for member in where}
        if len(paths) == 1 and len(where) == 2 and hasattr(type(model.get_submodule(path := paths.pop())), "rank"):
            if {(f"{path}.first.weight", 0), (f"{path}.second.weight", 1)} == {(m.parameter, m.dim) for m in where}:
                found[leaf] = path
    return found


def _names(
    members: dict[Index, list[Member]], consumed: set[tuple[str, int]], floats: set[str], ranks: dict[Index, str]
) -> dict[Index, str]:
    """A readable, unique and stable name for every leaf that has a producer, in model order."""
    chosen: dict[Index, str] = {}
    first: dict[Index, Member] = {}
    for leaf, found in members.items():
        producers = [m for m in found if (m.parameter, m.dim) not in consumed]
        if any(m.parameter in floats for m in found):
            first[leaf] = (producers or found)[0]
    sharing: dict[tuple[str, int], int] = {}
    for leaf, found in members.items():
        for m in found:
            sharing[m.parameter, m.dim] = sharing.get((m.parameter, m.dim), 0) + (leaf in first)
    taken: set[str] = set()
    for leaf, member in first.items():
        path, _, last = member.parameter.rpartition(".")
        base = path if last in ("weight", "bias") and path else member.parameter
        name = base
        if sharing[member.parameter, member.dim] > 1 or leaf.role in ("heads", "head_dim", "value_dim", "groups"):
            name = f"{base}:{leaf.role or 'part'}"
        if leaf in ranks:
            name = f"{ranks[leaf]}:rank"
        suffix = 2
        unique = name
        while unique in taken:
            unique, suffix = f"{name}{'' if ':' in name else ':'}{suffix}", suffix + 1
        taken.add(unique)
        chosen[leaf] = unique
    return chosen


def _attribute_laws(
    model: nn.Module, ties: _Ties, names: dict[Index, str], law: Any, axes: dict[str, Axis]
) -> list[AttributeLaw]:
    laws: list[AttributeLaw] = []
    modules = dict(model.named_modules())
    for key, dims in ties.measured.items():
        if not dims:
            continue
        node = find(dims[0])
        if is_fixed(node) or not any(leaf in names for leaf in leaves(node)):
            continue
        if is_standard(modules[key.module]) and key.name in _SHAPE_ATTRIBUTES:
            continue  # follows from the new parameter shapes
        laws.append(AttributeLaw(key.module, key.name, key.item, law(size_polynomial(node))))
    # counts of heads that the forward pass infers from a shape: kept true for whoever reads them
    counters = [(path, module, HEAD_COUNT_ATTRIBUTES & set(vars(module))) for path, module in modules.items()]
    heads = {leaf: {m.parameter for m in axes[name].members} for leaf, name in names.items() if leaf.role == "heads"}
    for path, module, attributes in counters:
        if not attributes:
            continue
        prefix = f"{path}." if path else ""
        inside = [leaf for leaf, parameters in heads.items() if any(p.startswith(prefix) for p in parameters)]
        if len(inside) != 1:
            continue  # in a stack of several attention layers an attribute speaks for all of them
        for attribute in attributes:
            value = vars(module)[attribute]
            is_unread = AttributeKey(path, attribute, None) not in ties.measured
            if type(value) is int and value == inside[0].size and is_unread:
                laws.append(AttributeLaw(path, attribute, None, law({(inside[0],): 1})))
    return laws
