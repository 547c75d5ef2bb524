"""The algebra of index sets against numpy: what survives a removal must be the same entries, however they are laid out."""

from __future__ import annotations

import random
from math import prod

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_compress.axes.algebra import (
    Index,
    concatenation,
    cut,
    find,
    fixed,
    freeze,
    is_fixed,
    leaves,
    positions,
    product,
    reshape,
    size_polynomial,
    split,
    unify,
)

DETERMINISTIC = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), max_examples=300
)


def survivors(dims: list[Index], removed: dict[Index, set[int]]) -> np.ndarray:
    """bool [sizes of dims]: the entries of a tensor that remain when indices of leaves are removed."""
    mask = np.ones([dim.size for dim in dims], dtype=bool)
    for axis, dim in enumerate(dims):
        keep = np.ones(dim.size, dtype=bool)
        for leaf, where in positions(dim).items():
            keep[where[sorted(removed.get(leaf, ()))].ravel()] = False
        mask &= keep.reshape([-1 if place == axis else 1 for place in range(len(dims))])
    return mask


def random_removal(dims: list[Index], draw: random.Random) -> dict[Index, set[int]]:
    free = {leaf for dim in dims for leaf in leaves(dim) if not leaf.frozen}
    return {
        leaf: set(draw.sample(range(leaf.size), draw.randint(0, leaf.size - 1)))
        for leaf in sorted(free, key=lambda leaf: leaf.serial)
    }


def random_sizes(total: int, draw: random.Random) -> list[int]:
    """Sizes with a given product."""
    sizes = []
    while total > 1 and draw.random() < 0.8:
        factor = draw.choice([d for d in range(1, total + 1) if total % d == 0])
        sizes.append(factor)
        total //= factor
    return [*sizes, total]


@DETERMINISTIC
@given(sizes=st.lists(st.integers(1, 8), min_size=1, max_size=4), seed=st.integers(0, 10_000))
def test_layout_operations_keep_the_same_entries(sizes: list[int], seed: int) -> None:
    draw = random.Random(seed)
    start = [Index(size) for size in sizes]
    history: list[tuple[list[Index], np.ndarray]] = []
    dims, entries = start, np.arange(prod(sizes)).reshape(sizes)
    for _ in range(draw.randint(1, 5)):
        if draw.random() < 0.4:
            order = draw.sample(range(len(dims)), len(dims))
            dims, entries = [dims[place] for place in order], entries.transpose(order)
        else:
            shape = random_sizes(entries.size, draw)
            dims, entries = reshape(dims, shape), entries.reshape(shape)
        assert [dim.size for dim in dims] == list(entries.shape)
        history.append((dims, entries))
    removed = random_removal(start, draw)
    expected = survivors(start, removed).ravel()
    for dims, entries in history:  # after the last operation, which may have split what the first ones saw
        assert (survivors(dims, removed) == expected[entries]).all()


@DETERMINISTIC
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=st.integers(0, 10_000))
def test_a_concatenation_cut_anywhere_keeps_the_same_entries(sizes: list[int], seed: int) -> None:
    draw = random.Random(seed)
    parts = [Index(size) if draw.random() < 0.8 else fixed(size, "test") for size in sizes]
    if draw.random() < 0.5:
        parts.append(parts[0])
    whole = concatenation(parts)
    borders = sorted(draw.sample(range(whole.size + 1), min(whole.size + 1, draw.randint(0, 3))))
    lengths = [b - a for a, b in zip([0, *borders], [*borders, whole.size], strict=True)]
    segments = cut(whole, lengths)
    removed = random_removal([whole], draw)
    expected = survivors([whole], removed)
    found = np.concatenate([survivors([segment], removed) for segment in segments if segment.size])
    assert (found == expected).all()


@DETERMINISTIC
@given(seed=st.integers(0, 10_000))
def test_unified_nodes_lose_the_same_indices_and_have_one_size(seed: int) -> None:
    draw = random.Random(seed)
    total = draw.choice([6, 8, 12, 16, 24])

    def node() -> Index:
        kind = draw.choice(["atom", "prod", "cat", "cat of products"])
        if kind == "atom":
            return Index(total)
        if kind == "prod":
            return product([Index(size) for size in random_sizes(total, draw)])
        first = draw.randint(1, total - 1)
        if kind == "cat":
            return concatenation([Index(first), Index(total - first)])
        if total % 4:
            return Index(total)
        return concatenation([product([Index(2), Index(total // 4)]), product([Index(total // 4), Index(2)])])

    nodes = [node() for _ in range(3)]
    unify(nodes[0], nodes[1])
    unify(nodes[2], nodes[1])
    removed = random_removal(nodes, draw)
    first, *others = [survivors([item], removed) for item in nodes]
    assert all((other == first).all() for other in others)
    kept = {leaf: leaf.size - len(removed.get(leaf, ())) for item in nodes for leaf in leaves(item)}
    for item in nodes:
        size = sum(c * prod(kept[leaf] for leaf in monomial) for monomial, c in size_polynomial(item).items())
        assert size == first.sum()


def test_what_cannot_be_reconciled_is_frozen() -> None:
    a, b = product([Index(4), Index(6)]), product([Index(6), Index(4)])
    unify(a, b)
    assert is_fixed(a) and is_fixed(b)
    atom = Index(6)
    unify(atom, concatenation([Index(3), product([Index(3)])]))
    assert find(atom).form == "cat"
    loop = Index(4)
    unify(loop, Index(5))
    assert is_fixed(loop)


def test_freezing_one_of_two_unified_nodes_freezes_both() -> None:
    a, b = Index(12), Index(12)
    heads, inner = split(a, (3, 4))
    unify(a, b)
    freeze(b, "test")
    assert is_fixed(heads) and is_fixed(inner)
