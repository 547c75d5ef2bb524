"""Attention and filters side by side in every block, so that a search decides which of them stays.

:func:`mix_attention` puts the candidates of a block next to each other, weighted by the softmax of one row of architecture
variables, as DARTS relaxes the choice of an operator (Liu et al. 2019, arXiv 1806.09055, Eq. 2).
:class:`~hf_compress.methods.ArchitectureSearchCallback` (RARTS, DARTS) moves the rows while Trainer trains, and
:func:`settle_attention` keeps one candidate in every block. Neither paper searches transformers; to choose between attention
and AFIDAF's filters in this way is an extension of our own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_compress.axes.finding import Inputs
from hf_compress.errors import MethodError, ModelError

from .filtered import FILTERS, Filter, FilteredTokens
from .importance import Batches, batches_for
from .replace import (
    ReplacedBlock,
    _check_matching,
    _choose,
    _chosen_blocks,
    _costs,
    _finish,
    _inputs,
    _made,
    _match,
    _need,
    _put,
    _watched,
    check_budget,
)
from .select import Budget


class MixedAttention(nn.Module):
    """An attention block and the filters that could stand in its place, weighted by the softmax of ``alpha``.

    Args:
        attention: the block as it was.
        filters: name -> the module that would replace it.

    Attributes:
        alpha: [1, 1 + filters], the architecture variables, attention first; zeros at first.
    """

    search_ends_by: ClassVar[str] = "settle_attention"

    def __init__(self, attention: nn.Module, filters: Mapping[Filter, FilteredTokens]):
        super().__init__()
        self.attention = attention
        self.filters = nn.ModuleDict({str(name): module for name, module in filters.items()})
        like = next(attention.parameters())
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.alpha = nn.Parameter(torch.zeros(1, 1 + len(filters), dtype=dtype, device=like.device))

    def architecture_parameters(self) -> dict[str, nn.Parameter]:
        """What a search moves; see :class:`~hf_compress.methods.ArchitectureSearchCallback`."""
        return {"alpha": self.alpha}

    @property
    def operators(self) -> tuple[str, ...]:
        """What the columns of ``alpha`` stand for."""
        return ("attention", *self.filters)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As the attention's own: float [batch, tokens, channels], and what it takes beside."""
        given = self.attention(hidden_states, *args, **kwargs)
        output, *more = given if isinstance(given, tuple) else (given,)
        first, *others = self.alpha[0].softmax(0).to(output.dtype)
        mixed = first * output
        for weight, module in zip(others, self.filters.values(), strict=True):
            mixed = mixed + weight * module(hidden_states)[0]
        return (mixed, *more) if isinstance(given, tuple) else mixed


def mix_attention(
    model: nn.Module,
    layers: str | Sequence[str] = "all",
    filters: Filter | Sequence[Filter] = "afidaf",
    *,
    batches: Batches = None,
    match_steps: int = 200,
    learning_rate: float = 2e-3,
    seed: int = 0,
    example_inputs: Inputs = None,
) -> nn.Module:
    """Put filters beside attention blocks of a vision transformer, in place, for a search to choose between them.

    Until :func:`settle_attention` has ended the search, every block computes all of its candidates, checkpoints are good
    for resuming only (``from_pretrained`` does not know mixtures), and the model cannot be pruned, factorised or quantized.
    For example::

        mix_attention(model, batches=loader)
        search = ArchitectureSearchCallback("rarts", architecture_lr=0.01)
        Trainer(model, args, train_dataset=search.halve(dataset), callbacks=[search]).train()
        settle_attention(model, macs=0.8)

    Args:
        model, layers: as for :func:`~hf_compress.replace_attention`, without "auto".
        filters: the candidates beside attention: one or several of "afidaf", "fourier", "image".
        batches: dicts as a ``DataLoader`` gives them; every filter is matched to its attention on these first, else it
            starts as it was made.
        match_steps, learning_rate: of matching.
        seed: of the filters' first weights.
        example_inputs: as for :func:`~hf_compress.surgery.find_attention`.

    Returns:
        ``model``.

    Raises:
        MethodError: when an argument is out of range, or a pattern matches no attention block.
        NothingToShrinkError: when the model has no attention block that can be replaced.
        DataError: when there is no batch.
        ModelError: when the model holds mixtures already, tokens are no map, the model was quantized, or a block was pruned
            or factorised before. In all of these cases the model is unchanged.
    """
    names: list[Filter] = [filters] if isinstance(filters, str) else list(dict.fromkeys(filters))  # type: ignore[list-item]
    if not names or any(name not in FILTERS for name in names):
        raise MethodError(f"filters={filters!r} is not possible; give one or more of {', '.join(map(repr, FILTERS))}.")
    if layers == "auto":
        raise MethodError('layers="auto" is for replace_attention, which chooses itself. Give "all" or patterns.')
    _check_matching(match_steps, learning_rate)
    if mixed_in(model):
        raise ModelError(f"this {type(model).__name__} holds mixtures already. End their search by settle_attention.")
    chosen = _chosen_blocks(model, layers, _inputs(model, example_inputs))
    held = None if batches is None else list(batches_for(model, batches))
    made = {kind: _made(model, chosen, kind, seed) for kind in names}
    if held is not None:
        for filters_of_a_kind in made.values():
            _match(model, filters_of_a_kind, held, match_steps, learning_rate)
    for name in chosen:
        attention = model.get_submodule(name)
        mixture = MixedAttention(attention, {kind: made[kind][name] for kind in names})
        _put(model, name, mixture.train(attention.training))
    return model


def mixed_in(model: nn.Module) -> dict[str, MixedAttention]:
    """Every mixture of a model, by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, MixedAttention)}


def settle_attention(
    model: nn.Module,
    *,
    count: int | None = None,
    macs: Budget = None,
    latency: float | None = None,
    example_inputs: Inputs = None,
) -> nn.Module:
    """Keep one candidate in every mixture, in place: the end of the search that :func:`mix_attention` began.

    Without a budget it is the one with the largest weight. With one, each block has its attention and the filter that has
    the largest weight, and blocks change to it until the budget is met: those first that ask least for it, by the difference
    of the two variables per saved cost. The model is then as :func:`~hf_compress.replace_attention` leaves it, reloads by
    ``from_pretrained`` and can be pruned. Train it a little: every block gave the mean of its candidates before.

    Args:
        model: with mixtures.
        count, macs, latency: at most one, as for :func:`~hf_compress.replace_attention`.
        example_inputs: as for :func:`~hf_compress.surgery.find_attention`.

    Returns:
        ``model``. What was done: :func:`~hf_compress.surgery.replacement_report`, with the logarithm of how many times the
        weight of attention the filter had.

    Raises:
        ModelError: when there is no mixture, or its variables are not finite.
        MethodError, BudgetError: for a budget that is none, or out of reach; the mixtures are then still there.
    """
    budget = check_budget(count, macs, latency)
    mixed = mixed_in(model)
    if not mixed:
        raise ModelError(f"this {type(model).__name__} holds no mixture of attention and filters; see mix_attention.")
    made: dict[str, FilteredTokens] = {}
    preference: dict[str, float] = {}
    for name, mixture in mixed.items():
        first, *others = mixture.alpha.detach()[0].double().tolist()
        if not all(abs(value) < float("inf") for value in (first, *others)):
            raise ModelError(f"the variables of {name!r} are not finite; the search diverged. Lower its learning rate.")
        place = max(range(len(others)), key=others.__getitem__)
        made[name] = list(mixture.filters.values())[place]  # type: ignore[assignment]
        preference[name] = others[place] - first
    for name, mixture in mixed.items():
        _put(model, name, mixture.attention)
    try:
        inputs = _inputs(model, example_inputs)
        watched = {block.name: (block, call) for block, call in _watched(model, inputs) if block.name in mixed}
        rows = {
            name: ReplacedBlock(block, made[name].filter, preference=preference[name])
            for name, (block, _) in watched.items()
        }
        if budget is None:
            taken = [name for name in rows if preference[name] > 0]
        else:
            rows = _costs(model, rows, {name: call for name, (_, call) in watched.items()}, made, budget)
            need = _need(model, rows, budget, inputs)
            taken = _choose({n: replace(row, loss_increase=-preference[n]) for n, row in rows.items()}, budget, need)
        return _finish(model, rows, made, taken)
    except BaseException:
        for name, mixture in mixed.items():
            _put(model, name, mixture)
        raise


__all__ = ["MixedAttention", "mix_attention", "mixed_in", "settle_attention"]
