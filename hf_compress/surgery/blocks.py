"""Whole blocks: which can go, how much each does, and removing them.

A block is an entry of an ``nn.ModuleList`` or ``nn.Sequential`` that adds something to what flows past it: it returns
tensors of the structure and shape that it was given, and returns exactly these once its own parameters (and the buffers of frozen norms) are zero. That is
seen by running it, not by knowing it. Layers that normalise behind the sum (the original transformer, DETR) do more than
add, and are no such blocks; entries that change the shape (the first of a stage) are none either.

Removing a block gives exactly the function that the model computes with the block passed over.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hf_compress.axes import AxisGraph, Cost, example_inputs_for
from hf_compress.axes.finding import Inputs, _one_example, is_standard, run_examples, undisturbed
from hf_compress.axes.tracing import tensors_in
from hf_compress.errors import BudgetError, MethodError, ModelError, NothingToShrinkError, PlanError

from .importance import Batches, Loss, batches_for, checked_loss, loss_of, with_requires_grad
from .select import Budget, budget_limits
from .shift import _probe
from .shrink import attach_record
from .skeleton import Record, is_numbered_list, record_of, remove_entries, restore_entries

BLOCK_METHODS = ("similarity", "loss")


@dataclass(frozen=True)
class Block:
    """An entry of a list of modules that the model also works without.

    Attributes:
        name: in ``named_modules()``: the list, a dot and the position.
        params: parameters that disappear with it; those shared with other modules stay.
        macs: multiply-accumulates of one example that disappear with it.
        siblings: entries that its list has, itself included; one of them must stay.
    """

    name: str
    params: int
    macs: int
    siblings: int


def find_blocks(model: nn.Module, example_inputs: Inputs = None) -> list[Block]:
    """Find the residual blocks of a model that it works without.

    One forward pass, one run of every candidate in float64 with zeros, and two passes that compare the model without
    the blocks with the model that passes them over. Where that fails, because layers are paired with something else by
    number, two passes for every block. Of blocks within blocks the innermost are given. The model, its mode and the
    random state are left as they were.

    Args:
        model: any module that runs eagerly.
        example_inputs: as for :func:`hf_compress.find_axes`; noise of the configured image size when not given. A
            block must not see zeros alone.

    Returns:
        In the order of ``named_modules()``; empty when the model has none.

    Raises:
        ModelError: when the model cannot be run on the inputs.
    """
    inputs = _inputs(model, example_inputs)
    blocks = _residual_blocks(model, inputs)
    together: list[str] = []
    left = {_holder(block.name): block.siblings for block in blocks}
    for block in blocks:
        if left[_holder(block.name)] > 1:
            left[_holder(block.name)] -= 1
            together.append(block.name)
    if not together or not _obstacle(model, together, inputs):
        return blocks
    return [block for block in blocks if not _obstacle(model, [block.name], inputs)]


def _holder(name: str) -> str:
    """The list that holds a block."""
    return name.rpartition(".")[0]


def _residual_blocks(model: nn.Module, example_inputs: Any) -> list[Block]:
    """What returns its input when its parameters are zero, whether or not the model works without."""
    candidates = _candidates(model)
    calls: dict[str, list[tuple[Any, Any]]] = {name: [] for name in candidates}
    begun: dict[str, int] = {}
    macs = dict.fromkeys(candidates, 0)
    no_blocks: set[str] = set()
    counter = FlopCounterMode(display=False)
    inputs = _one_example(example_inputs)  # costs are those of one example

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            calls[name].append(_mapped(args, Tensor.clone) + (_mapped(kwargs, Tensor.clone),))
            begun[name] = counter.get_total_flops()

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            macs[name] += (counter.get_total_flops() - begun[name]) // 2
            if _passed_over(args, kwargs, output) is None:
                no_blocks.add(name)
                calls[name].clear()

        return hook

    handles = []
    # the counter trips over parameters that are passed on as inputs while they require gradients
    with undisturbed(model), torch.no_grad(), with_requires_grad(model.parameters(), False):
        try:
            for name, module in candidates.items():
                handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
                handles.append(module.register_forward_hook(after(name), with_kwargs=True))
            with sdpa_kernel(SDPBackend.MATH), counter:
                run_examples(model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        found = [
            name
            for name, module in candidates.items()
            if name not in no_blocks and calls[name] and all(_only_adds(module, *call) for call in calls[name])
        ]
    found = [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
    uses = _uses(model)
    return [
        Block(
            name,
            sum(p.numel() for p in candidates[name].parameters() if uses[id(p)] == _uses(candidates[name])[id(p)]),
            macs[name],
            len(model.get_submodule(_holder(name))._modules),
        )
        for name in found
    ]


def block_scores(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Batches = None,
    *,
    method: str = "similarity",
    loss: Loss | None = None,
    example_inputs: Inputs = None,
) -> dict[str, float]:
    """How much every block does; the model is run in evaluation mode and left as it was.

    ``"similarity"``: 1 - cosine similarity of what enters and what leaves the block, taken over each whole example and
    averaged; one pass for all blocks, no labels. Block influence of Men et al. 2024 (arXiv 2403.03853), eq. 1, which
    takes it over each token. ``"loss"``: the increase of the loss when the block is passed over, averaged over batches;
    one pass for each block, and negative where the model is better off without.

    Args:
        model: the model that the blocks were found on.
        blocks: from :func:`find_blocks`.
        batches: dicts, as a ``DataLoader`` gives them, with labels for ``"loss"``. ``"similarity"`` also does without:
            it then runs the example inputs.
        method: ``"similarity"`` or ``"loss"``.
        loss: for ``"loss"``: ``loss(model, batch)`` -> scalar, :func:`~.importance.loss_of` when not given.
        example_inputs: as for :func:`find_blocks`.

    Returns:
        block name -> score, higher is more important.

    Raises:
        MethodError: for an unknown method, or when batches are missing.
        DataError: when there is no batch.
        ModelError: when the model fails on a batch, or a score is not finite.
    """
    if method not in BLOCK_METHODS:
        raise MethodError(
            f"the block scores {method!r} are not known; give one of {', '.join(map(repr, BLOCK_METHODS))}."
        )
    if method == "loss" and batches is None:
        raise MethodError("the block scores 'loss' need batches=, for example a DataLoader; 'similarity' needs none.")
    names = [block.name for block in blocks]
    with undisturbed(model), torch.no_grad():
        if method == "loss":
            scores = _loss_increases(model, names, batches, loss or loss_of)
        else:
            runs = [_inputs(model, example_inputs)] if batches is None else batches_for(model, batches)
            scores = _dissimilarities(model, names, runs)
    for name, score in scores.items():
        if not math.isfinite(score):
            raise ModelError(f"the score of block {name!r} is {score}: what flows through it is not finite, or zero.")
    return scores


def select_blocks(
    blocks: Sequence[Block],
    scores: Mapping[str, float],
    dense: AxisGraph | Cost,
    *,
    macs: Budget = None,
    params: Budget = None,
) -> list[str]:
    """Choose which blocks go under a budget; widths can be selected afterwards, on the model without them.

    Blocks go by score per cost, lowest first, until the budget is met; then those that were not needed come back, the
    best first. The costs of different blocks add up, so nothing is run.

    Args:
        blocks: from :func:`find_blocks`.
        scores: from :func:`block_scores`; blocks without a score stay.
        dense: what the whole model costs: its axes, or ``find_axes(model).cost()``.
        macs, params: as for :func:`hf_compress.select`.

    Returns:
        Names for :func:`remove_blocks`; empty when the budget is met as it is.

    Raises:
        BudgetError: when the budget is malformed or out of reach; one entry of every list stays.
        NothingToShrinkError: when there are no blocks.
    """
    limits = budget_limits(dense, macs, params)
    if not limits:
        raise BudgetError("no budget was given: pass macs= or params=.")
    scored = [block for block in blocks if block.name in scores]
    if not scored:
        raise NothingToShrinkError(
            "there is no block with a score. Models without residual blocks can be made thinner."
        )
    kinds = [kind for kind, _ in limits]
    totals = (dense.macs, dense.params)
    need = {kind: totals[kind] - limit for kind, limit in limits}

    def price(block: Block) -> float:  # as a share of what the budgets count
        costs = (block.macs, block.params)
        return max(costs[kind] / max(totals[kind], 1) for kind in kinds)

    def missing(chosen: Iterable[Block]) -> dict[int, int]:
        saved = [sum(block.macs for block in chosen), sum(block.params for block in chosen)]
        return {kind: need[kind] - saved[kind] for kind in kinds if need[kind] > saved[kind]}

    chosen: list[Block] = []
    left = {_holder(block.name): block.siblings for block in scored}
    for block in sorted(scored, key=lambda block: scores[block.name] / max(price(block), 1e-12)):
        if not missing(chosen):
            break
        holder = _holder(block.name)
        if left[holder] > 1:
            left[holder] -= 1
            chosen.append(block)
    if missing(chosen):
        gap = ", ".join(
            f"{('macs', 'params')[kind]} can be {(limit + missing(chosen).get(kind, 0)) / totals[kind]:.3f} of the dense"
            for kind, limit in limits
        )
        raise BudgetError(
            f"removing blocks alone does not reach the budget: {gap} model's at the least. Ask for that or more, and "
            "select widths for the rest."
        )
    for block in sorted(chosen, key=lambda block: -scores[block.name]):
        others = [other for other in chosen if other is not block]
        if not missing(others):
            chosen = others
    order = [block.name for block in blocks]
    return sorted((block.name for block in chosen), key=order.index)


def remove_blocks(model: nn.Module, blocks: Iterable[Block | str], *, example_inputs: Inputs = None) -> nn.Module:
    """Remove whole blocks, in place; entries behind them in their list move up.

    The result computes what the model computed with these blocks passed over. That is checked on the example inputs:
    models that pair their layers with something else by number are put back and refused. A model of transformers then
    carries the removal in the record of its configuration, so that ``save_pretrained`` and ``from_pretrained`` work.
    Blocks and widths may be removed in any order and repeatedly; find axes again after removing blocks.

    Args:
        model: any module that runs eagerly.
        blocks: from :func:`find_blocks`, or their names.
        example_inputs: as for :func:`find_blocks`.

    Returns:
        ``model``.

    Raises:
        PlanError: when a name is none of the model's blocks, or a list would lose all of its entries.
        ModelError: when the model does not work without the blocks; it is then unchanged.
    """
    blocks = [blocks] if isinstance(blocks, (str, Block)) else list(blocks)
    names = list(dict.fromkeys(block.name if isinstance(block, Block) else block for block in blocks))
    earlier = record_of(model) or Record()
    inputs = _inputs(model, example_inputs)
    known = {block.name: block for block in _residual_blocks(model, inputs)}
    for name in names:
        if name not in known:
            raise PlanError(
                f"{name!r} is no block that can be removed; the model has {len(known)}: {', '.join(list(known)[:8])}"
                f"{', ...' if len(known) > 8 else ''}. Print find_blocks(model) for all."
            )
        if sum(_holder(other) == _holder(name) for other in names) >= known[name].siblings:
            raise PlanError(
                f"{_holder(name)!r} would lose all {known[name].siblings} of its entries; leave at least one."
            )
    obstacle = _obstacle(model, names, inputs)
    if obstacle:
        raise ModelError(
            f"{type(model).__name__} does not work without {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}: "
            f"{obstacle}. It seems to pair these entries with something else by their number. The model is unchanged; "
            "remove other blocks, or make it thinner."
        )
    remove_entries(model, _positions(names))
    attach_record(model, earlier.merge(Record(removed=_positions(names))))
    return model


def _positions(names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    positions: dict[str, set[int]] = {}
    for name in names:
        positions.setdefault(_holder(name), set()).add(int(name.rpartition(".")[2]))
    return {holder: tuple(sorted(found)) for holder, found in positions.items()}


def _obstacle(model: nn.Module, names: Sequence[str], inputs: Any) -> str:
    """Why the model without some entries is not the model that passes them over; empty when it is."""
    with _passing_over(model, names):
        expected = _outputs_of(model, inputs)
    undo = remove_entries(model, _positions(names))
    try:
        return _difference(expected, _outputs_of(model, inputs))
    except ModelError as error:
        return f"it fails ({error.__cause__})"
    finally:
        restore_entries(undo)


# -- candidates ---------------------------------------------------------------------------------------------------


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Entries of lists with several entries; what is reached under more than one name has no position of its own."""
    named = list(model.named_modules(remove_duplicate=False))
    seen: dict[int, int] = {}
    for _, module in named:
        seen[id(module)] = seen.get(id(module), 0) + 1
    modules = dict(named)
    candidates = {}
    for name, module in named:
        holder = modules.get(_holder(name)) if name else None
        if holder is None or not is_numbered_list(holder) or len(holder._modules) < 2:
            continue
        is_layer = is_standard(module) and not module._modules  # a linear layer, a convolution, a norm
        if seen[id(module)] == seen[id(holder)] == 1 and not is_layer and next(module.parameters(), None) is not None:
            candidates[name] = module
    return candidates


def _uses(model: nn.Module) -> dict[int, int]:
    """id of a parameter -> number of names that it has."""
    counts: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    return counts


def _only_adds(module: nn.Module, *call: Any) -> bool:
    """Whether a module returns what it was given, once its parameters are zero."""
    *args, kwargs = call
    for dtype in (torch.float64, None):  # as it is where a module holds to its own dtype inside

        def cast(tensor: Tensor, dtype: torch.dtype | None = dtype) -> Tensor:
            return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor

        zeros = {name: cast(torch.zeros_like(parameter)) for name, parameter in module.named_parameters()}
        buffers = {name: cast(buffer) for name, buffer in module.named_buffers()}
        frozen = {name: torch.zeros_like(buffer) for name, buffer in buffers.items() if buffer.is_floating_point()}
        try:
            # a frozen norm holds its shift in a buffer; elsewhere zeros in a buffer may do harm
            return _returns_its_input(module, zeros | buffers, _mapped((tuple(args), kwargs), cast)) or (
                bool(frozen)
                and _returns_its_input(module, zeros | buffers | frozen, _mapped((tuple(args), kwargs), cast))
            )
        except Exception:  # whatever a module does that cannot run so
            continue
    return False


def _returns_its_input(module: nn.Module, state: Mapping[str, Tensor], call: tuple[Any, Any]) -> bool:
    state = {name: tensor.clone() for name, tensor in state.items()}
    output = functional_call(module, state, *_mapped(call, Tensor.clone))
    passed = _passed_over(*call, output)
    pairs = list(zip(tensors_in(passed), tensors_in(output), strict=True)) if passed is not None else []
    return bool(pairs) and all(_is_same(*pair) for pair in pairs)


def _is_same(given: Tensor, returned: Tensor) -> bool:
    if not given.is_floating_point():
        return torch.equal(given, returned)
    largest = float(given.abs().max()) if given.numel() else 0.0
    # zero in, zero out says nothing about a module without parameters; NaN compares false
    return largest > 0 and float((given - returned).abs().max()) <= 16 * torch.finfo(given.dtype).eps * largest


# -- passing over -------------------------------------------------------------------------------------------------


def _passed_over(args: Any, kwargs: Any, output: Any) -> Any:
    """The output's structure with every tensor replaced by the input that it continues; None where there is none.

    The tensors of the output continue those of the input that have their shape and dtype, in order.
    """
    given = tensors_in((args, kwargs))
    taken: set[int] = set()

    def match(value: Any) -> Any:
        if isinstance(value, Tensor):
            for i, tensor in enumerate(given):
                if i not in taken and tensor.shape == value.shape and tensor.dtype == value.dtype:
                    taken.add(i)
                    return tensor
            raise LookupError
        if type(value) in (tuple, list):
            return type(value)(match(item) for item in value)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise LookupError  # structures that no list of blocks passes on

    try:
        passed = match(output)
    except LookupError:
        return None
    return passed if taken else None


@contextmanager
def _passing_over(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """The named blocks return what they are given."""

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return _passed_over(args, kwargs, output)

    handles = [model.get_submodule(name).register_forward_hook(hook, with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mapped(nested: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(nested, Tensor):
        return change(nested)
    if type(nested) in (tuple, list):
        return type(nested)(_mapped(item, change) for item in nested)
    return {key: _mapped(item, change) for key, item in nested.items()} if type(nested) is dict else nested


# -- running ------------------------------------------------------------------------------------------------------


def _inputs(model: nn.Module, example_inputs: Inputs) -> Any:
    return _probe(example_inputs_for(model)) if example_inputs is None else example_inputs


def _outputs_of(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Every tensor that the model returns, by its place."""
    with undisturbed(model), torch.no_grad():
        output = run_examples(model, inputs)
    items = output.items() if isinstance(output, Mapping) else [("output", output)]
    return {f"{key}[{i}]": tensor for key, value in items for i, tensor in enumerate(tensors_in(value))}


def _difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """What differs between two outputs, in words; empty when nothing does."""
    if list(expected) != list(found):
        return f"it returns {len(found)} tensors in place of {len(expected)}"
    for place, tensor in expected.items():
        other = found[place]
        if tensor.shape != other.shape:
            return f"its {place} has shape {tuple(other.shape)} in place of {tuple(tensor.shape)}"
        if not tensor.is_floating_point():
            if not torch.equal(tensor, other):
                return f"its {place} differs"
            continue
        # the same operations in the same order: a few units in the last place at most
        room = (
            64
            * torch.finfo(tensor.dtype).eps
            * (float(tensor.abs().nan_to_num(0, 0, 0).max()) if tensor.numel() else 0)
        )
        if not torch.allclose(tensor, other, rtol=0, atol=room, equal_nan=True):
            return f"its {place} differs by {float((tensor - other).abs().max()):.3g} from passing them over"
    return ""


# -- scores -------------------------------------------------------------------------------------------------------


def _loss_increases(model: nn.Module, names: Sequence[str], batches: Batches, loss: Loss) -> dict[str, float]:
    totals = dict.fromkeys(names, 0.0)
    count = 0
    for count, batch in enumerate(batches_for(model, batches), 1):
        whole = float(checked_loss(model, batch, loss, count))
        for name in names:
            with _passing_over(model, [name]):
                totals[name] += float(checked_loss(model, batch, loss, count)) - whole
    return {name: total / count for name, total in totals.items()}


def _dissimilarities(model: nn.Module, names: Sequence[str], runs: Iterable[Any]) -> dict[str, float]:
    totals = dict.fromkeys(names, 0.0)
    counts = dict.fromkeys(names, 0)

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            leaving = next(tensor for tensor in tensors_in(output) if tensor.is_floating_point())
            entering = next(t for t in tensors_in(_passed_over(args, kwargs, output)) if t.shape == leaving.shape)
            wide = torch.promote_types(leaving.dtype, torch.float32)
            cosine = torch.cosine_similarity(entering.to(wide).flatten(1), leaving.to(wide).flatten(1), dim=1)
            totals[name] += float((1 - cosine).clamp_min(0).sum())  # rounding may exceed one
            counts[name] += len(cosine)

        return hook

    handles = [model.get_submodule(n).register_forward_hook(watch(n), with_kwargs=True) for n in names]
    try:
        for run in runs:
            run_examples(model, run)
    finally:
        for handle in handles:
            handle.remove()
    return {name: totals[name] / counts[name] if counts[name] else math.nan for name in names}
