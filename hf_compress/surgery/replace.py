"""Put filters in place of self-attention in a trained vision transformer: which blocks, with what weights, at what price.

A filter over a map of tokens costs in proportion to their number, attention with its square; see :mod:`.filtered` for the
module. A block is first matched on unlabelled images, one by one and all at once: it reads what the model as it was feeds
its attention, and learns to give what that attention gives. Training of the whole model comes afterwards, with Trainer.

Replacing trained attention by AFIDAF's filters (Zheng et al. 2024, arXiv 2407.12217) is an extension of our own; the paper
trains networks of filters from scratch. Matching blocks to those of a teacher is the usual first step of such conversions.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_compress.axes import Cost, example_inputs_for
from hf_compress.axes.finding import Inputs, _one_example, run_examples, run_model, undisturbed
from hf_compress.errors import BudgetError, DataError, MethodError, ModelError, NothingToShrinkError

from .filtered import (
    FILTERS,
    LONGEST_SIDE,
    MOST_PREFIX_TOKENS,
    Filter,
    FilteredTokens,
    filtered_from,
    filtered_in,
    is_attention,
)
from .importance import Batches, Loss, batches_for, checked_loss, loss_of, with_requires_grad
from .select import Budget, budget_limits
from .shrink import attach_record
from .skeleton import Record, record_of

_TIMING_ROUNDS = 7  # of one block against its filter


@dataclass(frozen=True)
class AttentionBlock:
    """A self-attention block that a filter can stand in for.

    Attributes:
        name: path of the module.
        channels: of its tokens.
        heads: of the attention.
        grid: height and width of its map in tokens: of the image, or of a window.
        prefix: class and register tokens in front of the map.
        windows: how many maps one image has there.
    """

    name: str
    channels: int
    heads: int
    grid: tuple[int, int]
    prefix: int
    windows: int


@dataclass(frozen=True)
class ReplacedBlock:
    """One row of a :class:`ReplacementReport`. None stands for what was not measured.

    Attributes:
        block: what was there before.
        filter: what stands there now; None where the attention stayed.
        macs, filter_macs: multiply-accumulates of one image, of the attention and of the filter.
        ms, filter_ms: milliseconds for one image, likewise.
        error: of the filter's output on the batches: its squared distance from the attention's, over the variance of
            the latter. 1 is as good as a constant.
        first_error: the same before matching.
        loss_increase: of the model when this block alone is replaced.
        preference: of a search: the logarithm of how many times the weight of attention the filter had.
    """

    block: AttentionBlock
    filter: Filter | None
    macs: int | None = None
    filter_macs: int | None = None
    ms: float | None = None
    filter_ms: float | None = None
    error: float | None = None
    first_error: float | None = None
    loss_increase: float | None = None
    preference: float | None = None


@dataclass(frozen=True)
class ReplacementReport:
    """What :func:`replace_attention` did; prints as a table."""

    rows: tuple[ReplacedBlock, ...]

    @property
    def replaced(self) -> list[str]:
        """Paths of the blocks that were replaced."""
        return [row.block.name for row in self.rows if row.filter is not None]

    def __str__(self) -> str:
        lines = [("attention", "now", "map", "MACs", "ms", "output error", "loss increase", "preference")]
        for row in self.rows:
            map_of = " x ".join(map(str, row.block.grid)) + (f" + {row.block.prefix}" if row.block.prefix else "")
            lines.append(
                (
                    row.block.name,
                    row.filter or "attention",
                    map_of,
                    "" if row.macs is None else f"{row.macs:,} -> {row.filter_macs:,}",
                    "" if row.ms is None or row.filter_ms is None else f"{row.ms:.3g} -> {row.filter_ms:.3g}",
                    "" if row.error is None else f"{row.first_error:.3f} -> {row.error:.3f}",
                    "" if row.loss_increase is None else f"{row.loss_increase:+.4f}",
                    "" if row.preference is None else f"{row.preference:+.4f}",
                )
            )
        used = [column for column in zip(*lines, strict=True) if any(column[1:])]
        widths = [max(map(len, column)) for column in used]
        text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in zip(*used, strict=True)]
        return "\n".join([text[0], "-" * max(map(len, text)), *text[1:]])


# -- finding --------------------------------------------------------------------------------------------------------


def find_attention(model: nn.Module, example_inputs: Inputs = None) -> list[AttentionBlock]:
    """Find the attention blocks of a model that a filter can stand in for.

    One forward pass tells how many tokens every block reads, two more with a changed corner of the image that the map
    comes last and begins behind the class and register tokens. Tokens that are no map of the image are taken for a
    square window of it.

    Args:
        model: with ``config.patch_size``, as vision transformers have it.
        example_inputs: as for :func:`hf_compress.find_axes`. Grids are those of this image size.

    Returns:
        In the order of the forward pass; empty when there are none.

    Raises:
        ModelError: when the model cannot be run, has no patch size, or its tokens are no map.
    """
    return [block for block, _ in _watched(model, _inputs(model, example_inputs))]


Call = tuple[tuple[Any, ...], dict[str, Any], Tensor]
"""Positional and keyword inputs of an attention block, and what it returned first."""


def _watched(model: nn.Module, inputs: Any) -> list[tuple[AttentionBlock, Call]]:
    """Attention blocks in the order in which they run, each with its first call."""
    inputs = _one_example(inputs)
    blocks = {path: module for path, module in model.named_modules() if is_attention(module)}
    with undisturbed(model), torch.no_grad():
        calls = _calls_of(model, blocks, inputs)
        if not calls:
            return []
        height, width = _patch_grid(model, inputs)
        found = []
        for path, call in calls.items():
            windows, tokens, channels = call[0][0].shape
            prefix, grid = tokens - height * width, (height, width)
            if not 0 <= prefix <= MOST_PREFIX_TOKENS:
                side = math.isqrt(tokens)
                prefix, grid = 0, (side, side)
                if side * side != tokens:
                    raise ModelError(
                        f"{path!r} reads {tokens} tokens, which are neither the {height} x {width} patches of the image "
                        f"with up to {MOST_PREFIX_TOKENS} tokens before them nor a square window. Filters need a map."
                    )
            heads: int = blocks[path].num_attention_heads  # type: ignore[assignment]
            found.append((AttentionBlock(path, channels, heads, grid, prefix, windows), call))
        whole = next((block for block, _ in found if block.grid == (height, width) and block.windows == 1), None)
        if whole is not None:
            _check_order(model, blocks | dict(filtered_in(model)), inputs, whole)
    return found


def _calls_of(model: nn.Module, blocks: Mapping[str, nn.Module], inputs: Any) -> dict[str, Call]:
    calls: dict[str, Call] = {}

    def keep(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            args, kwargs = _with_tokens(args, kwargs)
            if path not in calls and args and args[0].dim() == 3:
                calls[path] = (args, kwargs, _tokens_of(output))

        return hook

    with _hooked({path: keep(path) for path in blocks}, blocks):
        run_examples(model, inputs)
    return calls


def _with_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with the tokens as the first positional input."""
    rest = dict(kwargs)
    if not args and "hidden_states" in rest:
        args = (rest.pop("hidden_states"),)
    return (args, rest) if args and isinstance(args[0], Tensor) else ((), rest)


def _tokens_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def _hooked(hooks: Mapping[str, Callable[..., Any]], modules: Mapping[str, nn.Module]) -> Iterator[None]:
    handles = [modules[path].register_forward_hook(hook, with_kwargs=True) for path, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _images_in(inputs: Any) -> Tensor:
    if isinstance(inputs, Mapping):
        inputs = inputs.get("pixel_values")
    elif isinstance(inputs, (tuple, list)):
        inputs = inputs[0] if inputs else None
    if not isinstance(inputs, Tensor) or inputs.dim() != 4:
        raise ModelError("the example inputs hold no images (pixel_values of [batch, channels, height, width]).")
    return inputs


def _patch_sizes(model: nn.Module) -> tuple[int, int]:
    config = getattr(model, "config", None)
    holders = (config, getattr(config, "backbone_config", None), getattr(config, "vision_config", None))
    size = next((getattr(h, "patch_size", None) for h in holders if getattr(h, "patch_size", None)), None)
    if size is None:
        raise ModelError(
            f"{type(model).__name__} has no config.patch_size, so that it is not known which tokens are a map. Filters can "
            "stand in for attention in vision transformers of transformers: vit, deit, swin, dinov2."
        )
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    return int(height), int(width)


def _patch_grid(model: nn.Module, inputs: Any) -> tuple[int, int]:
    image, (height, width) = _images_in(inputs), _patch_sizes(model)
    grid = image.shape[2] // height, image.shape[3] // width
    if not all(1 <= side <= LONGEST_SIDE for side in grid):
        raise ModelError(
            f"an image of {image.shape[2]} x {image.shape[3]} pixels has {grid[0]} x {grid[1]} patches; 1 to "
            f"{LONGEST_SIDE} a side are possible. Give example_inputs of another size."
        )
    return grid


def _check_order(model: nn.Module, blocks: Mapping[str, nn.Module], inputs: Any, whole: AttentionBlock) -> None:
    """See that the first patch is the first token behind the prefix, and the last one the last token.

    Args:
        blocks: all that mix tokens. What the first of them reads is looked at, before anything is mixed.
        whole: one that reads the whole map.
    """
    image, (height, width) = _images_in(inputs), _patch_sizes(model)
    rows, columns = whole.grid
    seen = []
    for corner in (None, (0, 0), ((rows - 1) * height, (columns - 1) * width)):
        changed = torch.zeros_like(image)
        if corner is not None:
            top, left = corner
            changed[..., top : top + height, left : left + width] = 1.0
        given = {**inputs, "pixel_values": changed} if isinstance(inputs, Mapping) else changed
        tokens, *_ = next(iter(_calls_of(model, blocks, given).values()))[0]
        seen.append(tokens)
    for other, place in zip(seen[1:], (whole.prefix, -1), strict=True):
        differs = (other != seen[0]).any(dim=2)[0]
        expected = torch.zeros_like(differs)
        expected[place] = True
        if not torch.equal(differs, expected):
            raise ModelError(
                f"the tokens of {whole.name!r} are not {whole.prefix} class and register tokens and then the patches row by "
                "row, each of one place of the image. Filters cannot stand in for this attention."
            )


# -- replacing ------------------------------------------------------------------------------------------------------


def replace_attention(
    model: nn.Module,
    layers: str | Sequence[str] = "all",
    filter: Filter = "afidaf",
    *,
    count: int | None = None,
    macs: Budget = None,
    latency: float | None = None,
    batches: Batches = None,
    match_steps: int = 200,
    learning_rate: float = 2e-3,
    loss: Loss | None = None,
    seed: int = 0,
    example_inputs: Inputs = None,
) -> nn.Module:
    """Put AFIDAF's filters in place of attention blocks of a trained vision transformer, in place.

    With batches every filter is matched to its attention first (see :func:`match_blocks`). Train the whole model
    afterwards; filters are new parameters, so make optimizers then. Class and register tokens keep their attention. A
    model of transformers carries the change in the record of its configuration, so that ``save_pretrained`` and
    ``from_pretrained`` work. Where there are class tokens the model gets more parameters, not fewer.

    With ``layers="auto"`` all blocks are matched, the loss is measured with each of them replaced alone, and blocks are
    replaced by loss increase per saved cost, lowest first, until the budget is met; then those that were not needed come
    back. Blocks in which a filter saves nothing stay.

    Args:
        model: of transformers: ViT, DeiT, Swin, DINOv2 and others with such attention blocks.
        layers: "all"; patterns of module names, such as "vit.layers.1*", which match a block or something that holds
            blocks; or "auto".
        filter: "afidaf", or one of its two filters alone: "fourier", "image".
        count: with "auto": replace so many blocks.
        macs: with "auto": a budget of multiply-accumulates of the whole model: a share (up to 1) or a number.
        latency: with "auto": a budget of time for one image on this machine, from times of the model and of each block
            with its filter: a share (up to 1) or milliseconds.
        batches: dicts as a ``DataLoader`` gives them. Labels are needed for ``"auto"`` alone, whose loss they give.
        match_steps: of matching, each on one batch.
        learning_rate: of matching; it falls to zero linearly. Needs more than 0.
        loss: for "auto": ``loss(model, batch)`` -> scalar.
        seed: of the filters' first weights.
        example_inputs: as for :func:`find_attention`.

    Returns:
        ``model``. What was done: :func:`replacement_report`.

    Raises:
        MethodError: when an argument is out of range, or a pattern matches no attention block.
        NothingToShrinkError: when the model has no attention block that can be replaced.
        BudgetError: when the budget is out of reach; names the lowest reachable.
        DataError: when there is no batch.
        ModelError: when tokens are no map, the model was quantized, or a block was pruned or factorised before. In all
            of these cases the model is unchanged.
    """
    budget = _check(layers, filter, count, macs, latency, batches, match_steps, learning_rate)
    inputs = _inputs(model, example_inputs)
    chosen = _chosen_blocks(model, layers, inputs)
    made = _made(model, chosen, filter, seed)
    rows = {name: ReplacedBlock(block, filter) for name, (block, _) in chosen.items()}
    need = 0.0
    if budget is not None:
        rows = _costs(model, rows, {name: call for name, (_, call) in chosen.items()}, made, budget)
        need = _need(model, rows, budget, inputs)
    if batches is not None:
        held = list(batches_for(model, batches))
        rows = _matched(model, made, rows, held, match_steps, learning_rate)
        if budget is not None:
            rows = _with_losses(model, made, rows, held, loss or loss_of)
    taken = list(made) if budget is None else _choose(rows, budget, need)
    return _finish(model, rows, made, taken)


def _chosen_blocks(
    model: nn.Module, layers: str | Sequence[str], inputs: Any
) -> dict[str, tuple[AttentionBlock, Call]]:
    """The attention blocks that ``layers`` names and that can be replaced, with their first calls.

    Raises:
        NothingToShrinkError, MethodError, ModelError: see :func:`replace_attention`.
    """
    earlier = record_of(model) or Record()
    watched = _watched(model, inputs)
    if not watched:
        done = sum(1 for _ in filtered_in(model))
        more = f" but {done} in whose place filters stand already" if done else ""
        raise NothingToShrinkError(
            f"{type(model).__name__} has no attention block{more} that a filter can stand in for. That takes blocks with "
            "q_proj, k_proj, v_proj and o_proj of one width, as in transformers' vit, deit, swin and dinov2. One that was "
            "pruned or factorised is none: replace attention first."
        )
    wanted = _wanted([block.name for block, _ in watched], layers, model)
    for name in wanted:
        _check_block(model, name, earlier)
    return {block.name: (block, call) for block, call in watched if block.name in wanted}


def _made(
    model: nn.Module, chosen: Mapping[str, tuple[AttentionBlock, Call]], filter: Filter, seed: int
) -> dict[str, FilteredTokens]:
    """A filter for every chosen block, with first weights; the random state is left as it was."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        return {
            name: filtered_from(model.get_submodule(name), filter, block.grid, block.prefix)
            for name, (block, _) in chosen.items()
        }


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    holder, _, last = name.rpartition(".")
    model.get_submodule(holder)._modules[last] = module


def _finish(
    model: nn.Module,
    rows: Mapping[str, ReplacedBlock],
    made: Mapping[str, FilteredTokens],
    taken: Sequence[str],
) -> nn.Module:
    """Put the filters of the blocks that are taken in their places, and let the model remember it."""
    earlier = record_of(model) or Record()
    for name in taken:
        _put(model, name, made[name].train(model.get_submodule(name).training))
    filtered = {name: (made[name].filter, rows[name].block.grid, rows[name].block.prefix) for name in taken}
    attach_record(model, earlier.merge(Record(filtered=filtered)))
    table = tuple(row if name in taken else replace(row, filter=None) for name, row in rows.items())
    model.hf_compress_replacement_report = ReplacementReport(table)  # type: ignore[assignment]
    return model


def replacement_report(model: nn.Module) -> ReplacementReport:
    """What :func:`replace_attention` last did to a model, where it ran in this process.

    Raises:
        ModelError: when it did not.
    """
    held = vars(model).get("hf_compress_replacement_report")
    if held is None:
        raise ModelError(
            f"nothing was replaced in this {type(model).__name__} here. A reloaded model knows what stands where, not how it "
            "came about: print the model."
        )
    return held


def match_blocks(
    model: nn.Module,
    teacher: nn.Module,
    batches: Batches,
    *,
    steps: int = 200,
    learning_rate: float = 2e-3,
) -> dict[str, tuple[float, float]]:
    """Train the filters of a model to give what the attention in their places in another model gives, in place.

    The filters read what the teacher feeds its attention, so that no error of one reaches another, and all of them learn
    at once. What is minimised is the squared distance over the variance of the attention's output. Nothing else in either
    model changes.

    Args:
        model: one whose attention was replaced.
        teacher: the model from before; ``copy.deepcopy(model)`` makes one beforehand.
        batches: dicts, as a ``DataLoader`` gives them; labels are not needed. Run through again as often as needed.
        steps: of AdamW, each on one batch.
        learning_rate: of the first step; it falls to zero linearly.

    Returns:
        path of every filter -> its error on all batches before and after; 1 is as good as a constant.

    Raises:
        MethodError: when an argument is out of range.
        ModelError: when the model has no filters, or the teacher no attention in their places.
        DataError: when there is no batch.
    """
    _check_matching(steps, learning_rate)
    made = dict(filtered_in(model))
    if not made:
        raise ModelError(
            f"{type(model).__name__} has no filters in place of attention; replace_attention puts them there."
        )
    for name in made:
        try:
            is_there = is_attention(teacher.get_submodule(name))
        except AttributeError:
            is_there = False
        if not is_there:
            raise ModelError(f"the teacher has no attention at {name!r}. Give the model from before the replacement.")
    return _match(teacher, made, list(batches_for(teacher, batches)), steps, learning_rate)


# -- arguments ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Budget:
    count: int | None
    macs: Budget
    latency: float | None


def _check(
    layers: str | Sequence[str],
    filter: str,
    count: int | None,
    macs: Budget,
    latency: float | None,
    batches: Batches,
    steps: int,
    learning_rate: float,
) -> _Budget | None:
    if filter not in FILTERS:
        raise MethodError(f"filter={filter!r} is not known; give one of {', '.join(map(repr, FILTERS))}.")
    _check_matching(steps, learning_rate)
    budget = check_budget(count, macs, latency)
    if layers != "auto":
        if budget is not None:
            (given,) = [name for name, value in vars(budget).items() if value is not None]
            raise MethodError(f'{given} chooses layers, so it needs layers="auto"; got layers={layers!r}.')
        return None
    if budget is None:
        raise MethodError('layers="auto" needs exactly one of count=, macs= and latency=; got none.')
    if batches is None:
        raise MethodError(
            'layers="auto" measures how much the loss grows and needs batches=, for example a DataLoader over a few '
            "hundred training examples."
        )
    return budget


def check_budget(count: int | None, macs: Budget, latency: float | None) -> _Budget | None:
    """What is to be reached; None when nothing is given.

    Raises:
        MethodError: when several are given, or ``count`` is no number of blocks.
        BudgetError: for a budget that is none.
    """
    given = [name for name, value in (("count", count), ("macs", macs), ("latency", latency)) if value is not None]
    if len(given) > 1:
        raise MethodError(f"give one of count=, macs= and latency=; got {' and '.join(given)}.")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise MethodError(f"count={count!r} is not a number of blocks: give 1 or more.")
    if latency is not None and (isinstance(latency, bool) or not 0 < latency < math.inf):
        raise BudgetError(f"latency={latency!r} is not a budget: give a share (up to 1) or milliseconds.")
    if macs is not None:
        budget_limits(Cost(1, 1), macs, None)  # refuses what is no budget
    return _Budget(count, macs, latency) if given else None


def _check_matching(steps: int, learning_rate: float) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise MethodError(f"{steps!r} steps of matching are not possible: give 0 or more.")
    if not 0 < learning_rate < math.inf:
        raise MethodError(f"learning_rate={learning_rate!r} is not possible: give a number above 0.")


def _wanted(names: Sequence[str], layers: str | Sequence[str], model: nn.Module) -> list[str]:
    if isinstance(layers, str) and layers in ("all", "auto"):
        return list(names)
    found: set[str] = set()
    patterns = [layers] if isinstance(layers, str) else list(layers)
    if not patterns:
        raise MethodError('layers is empty: give patterns of attention blocks, "all" or "auto".')
    for pattern in patterns:
        matches = {n for n in names if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, f"{pattern}.*")}
        if not matches:
            exists = any(fnmatch.fnmatchcase(path, pattern) for path, _ in model.named_modules() if path)
            what = "matches modules, but none that is or holds an attention block" if exists else "matches nothing"
            shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            raise MethodError(f"layers: {pattern!r} {what}. The attention blocks of this model are {shown}.")
        found |= matches
    return [name for name in names if name in found]


def _check_block(model: nn.Module, name: str, earlier: Record) -> None:
    """The record speaks of attention as the configuration builds it, so it must be that still."""
    inside = f"{name}."
    touched = [*earlier.shapes, *earlier.biases, *earlier.factorized, *(f"{path}." for path in earlier.attributes)]
    if any(path.startswith(inside) for path in touched):
        raise ModelError(
            f"{name!r} was pruned or factorised before. Replace attention first and prune afterwards, or leave this block "
            "out of layers."
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    if sum(module is modules[name] for module in modules.values()) > 1:
        raise ModelError(f"{name!r} is reached under another name as well, so it cannot be replaced in one place.")


def _inputs(model: nn.Module, example_inputs: Inputs) -> Any:
    return example_inputs_for(model) if example_inputs is None else example_inputs


# -- matching -------------------------------------------------------------------------------------------------------


def _matched(
    model: nn.Module,
    made: Mapping[str, FilteredTokens],
    rows: Mapping[str, ReplacedBlock],
    batches: Sequence[Any],
    steps: int,
    learning_rate: float,
) -> dict[str, ReplacedBlock]:
    errors = _match(model, made, batches, steps, learning_rate)
    return {name: replace(row, first_error=errors[name][0], error=errors[name][1]) for name, row in rows.items()}


def _match(
    teacher: nn.Module, made: Mapping[str, FilteredTokens], batches: Sequence[Any], steps: int, learning_rate: float
) -> dict[str, tuple[float, float]]:
    blocks = {name: teacher.get_submodule(name) for name in made}
    parameters = [parameter for module in made.values() for parameter in module.parameters()]
    modes = {name: module.training for name, module in made.items()}
    with undisturbed(teacher), torch.no_grad(), with_requires_grad(parameters, True):
        before = _errors(teacher, blocks, made, batches)
        if steps:
            optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
            for module in made.values():
                module.train()

            def learn(name: str) -> Callable[..., None]:
                def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                    tokens, target = _with_tokens(args, kwargs)[0][0], _tokens_of(output)
                    with torch.enable_grad():  # and at once, so that no block's activations wait for another's
                        distance, variance = _distance(made[name](tokens)[0], target)
                        (distance / variance).backward()

                return hook

            with _hooked({name: learn(name) for name in made}, blocks):
                for batch in itertools.islice(itertools.cycle(batches), steps):
                    run_model(teacher, _without_labels(batch))
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
        for name, module in made.items():
            module.train(modes[name])
        after = _errors(teacher, blocks, made, batches) if steps else before
    for name, (_, error) in zip(made, after.items(), strict=True):
        if not math.isfinite(error):
            raise ModelError(f"matching {name!r} diverged; its error is {error}. Give a lower learning_rate.")
    return {name: (before[name], after[name]) for name in made}


def _errors(
    teacher: nn.Module, blocks: Mapping[str, nn.Module], made: Mapping[str, FilteredTokens], batches: Sequence[Any]
) -> dict[str, float]:
    sums = {name: [0.0, 0.0] for name in made}

    def measure(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            distance, variance = _distance(made[name].eval()(_with_tokens(args, kwargs)[0][0])[0], _tokens_of(output))
            sums[name][0] += float(distance)
            sums[name][1] += float(variance)

        return hook

    with _hooked({name: measure(name) for name in made}, blocks):
        for batch in batches:
            run_model(teacher, _without_labels(batch))
    return {name: distance / variance for name, (distance, variance) in sums.items()}


def _distance(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared distance, and the variance of the target over examples and tokens."""
    output, target = output.float(), target.float()
    spread = target - target.mean(dim=(0, 1), keepdim=True)
    return (output - target).square().mean(), spread.square().mean().clamp_min(torch.finfo(torch.float32).tiny)


def _without_labels(batch: Any) -> Any:
    if not isinstance(batch, Mapping):
        raise DataError(f"each batch must be a dict of keyword arguments, got {type(batch).__name__}.")
    return {name: value for name, value in batch.items() if name != "labels"}


# -- choosing -------------------------------------------------------------------------------------------------------


def _costs(
    model: nn.Module,
    rows: Mapping[str, ReplacedBlock],
    calls: Mapping[str, Call],
    made: Mapping[str, FilteredTokens],
    budget: _Budget,
) -> dict[str, ReplacedBlock]:
    """Rows with the costs of attention and filters; blocks of one kind are measured once."""
    from hf_compress.measurement.cost import count_macs  # which knows plans
    from hf_compress.measurement.latency import compare_latency

    known: dict[Any, dict[str, Any]] = {}
    found = {}
    for name, row in rows.items():
        kind = (replace(row.block, name=""), tuple(sorted(calls[name][1])))
        if kind not in known:
            args, kwargs, _ = calls[name]
            pair = (model.get_submodule(name), made[name])
            with undisturbed(pair[0]), undisturbed(pair[1]), torch.no_grad():
                # windows of one image are a batch to the block, so nothing may take the first of them alone
                macs = [count_macs(_Whole(module, args, kwargs), (torch.zeros(1),)) for module in pair]
                known[kind] = {"macs": macs[0], "filter_macs": macs[1]}
                if budget.latency is not None:
                    runs = {str(i): _caller(module, args, kwargs) for i, module in enumerate(pair)}
                    times = compare_latency(runs, _TIMING_ROUNDS)
                    known[kind] |= {"ms": times["0"], "filter_ms": times["1"]}
        found[name] = replace(row, **known[kind])
    return found


class _Whole(nn.Module):
    """A block with its inputs, as a module that takes none."""

    def __init__(self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]):
        super().__init__()
        self.block, self.args, self.kwargs = block, args, kwargs

    def forward(self, unused: Tensor) -> Any:
        return self.block(*self.args, **self.kwargs)


def _caller(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[[], Any]:
    return lambda: module(*args, **kwargs)


def _saved(row: ReplacedBlock, budget: _Budget) -> float:
    """Of what the budget counts."""
    if budget.count is not None:
        return 1.0
    if budget.latency is not None:
        return (row.ms or 0.0) - (row.filter_ms or 0.0)
    return float((row.macs or 0) - (row.filter_macs or 0))


def _need(model: nn.Module, rows: Mapping[str, ReplacedBlock], budget: _Budget, inputs: Any) -> float:
    """How much must be saved of what the budget counts.

    Raises:
        BudgetError: when that is more than all blocks together save.
    """
    from hf_compress.measurement.cost import count_macs
    from hf_compress.measurement.latency import compare_latency

    most = sum(max(_saved(row, budget), 0.0) for row in rows.values())
    if budget.count is not None:
        if budget.count > most:
            raise BudgetError(f"count={budget.count}: the model has {len(rows)} attention blocks that can be replaced.")
        return float(budget.count)
    inputs = _one_example(inputs)
    if budget.latency is not None:
        with undisturbed(model):
            whole = compare_latency({"model": lambda: run_model(model, inputs)}, _TIMING_ROUNDS)["model"]
        need = whole - (budget.latency * whole if budget.latency <= 1 else budget.latency)
    else:
        whole = count_macs(model, inputs)
        ((_, limit),) = budget_limits(Cost(int(whole), 0), budget.macs, None)
        need = whole - limit
    if most >= need:
        return need
    name, unit = ("latency", " ms") if budget.latency is not None else ("macs", "")
    asked = budget.latency if budget.latency is not None else budget.macs
    raise BudgetError(
        f"{name}={asked} cannot be reached by replacing attention alone: the lowest is {(whole - most) / whole:.3f} of the "
        f"model's {whole:,.4g}{unit}. Ask for that or more, and prune or factorise for the rest. Filters save most on large "
        "maps; on small ones attention can be the cheaper of the two."
    )


def _with_losses(
    model: nn.Module,
    made: Mapping[str, FilteredTokens],
    rows: Mapping[str, ReplacedBlock],
    batches: Sequence[Any],
    loss: Loss,
) -> dict[str, ReplacedBlock]:
    """Rows with the increase of the loss when each block alone is replaced."""

    def instead(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            return made[name](*args, **kwargs)

        return hook

    modes = {name: module.training for name, module in made.items()}
    blocks = {name: model.get_submodule(name) for name in made}
    totals = dict.fromkeys(made, 0.0)
    with undisturbed(model), torch.no_grad():
        for module in made.values():
            module.eval()
        for number, batch in enumerate(batches, 1):
            whole = float(checked_loss(model, batch, loss, number))
            for name in made:
                with _hooked({name: instead(name)}, blocks):
                    totals[name] += float(checked_loss(model, batch, loss, number)) - whole
    for name, module in made.items():
        module.train(modes[name])
    return {name: replace(row, loss_increase=totals[name] / len(batches)) for name, row in rows.items()}


def _choose(rows: Mapping[str, ReplacedBlock], budget: _Budget, need: float) -> list[str]:
    able = [name for name, row in rows.items() if _saved(row, budget) > 0]

    def price(name: str) -> float:
        increase, saved = rows[name].loss_increase or 0.0, _saved(rows[name], budget)
        return increase / saved if increase > 0 else increase * saved  # where the loss falls, more saved is better

    chosen: list[str] = []
    for name in sorted(able, key=price):
        if sum(_saved(rows[other], budget) for other in chosen) >= need:
            break
        chosen.append(name)
    for name in sorted(chosen, key=lambda name: -(rows[name].loss_increase or 0.0)):
        others = [other for other in chosen if other != name]
        if others and sum(_saved(rows[other], budget) for other in others) >= need:
            chosen = others
    return [name for name in rows if name in chosen]


__all__ = [
    "AttentionBlock",
    "ReplacedBlock",
    "ReplacementReport",
    "find_attention",
    "match_blocks",
    "replace_attention",
    "replacement_report",
]
