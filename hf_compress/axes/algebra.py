"""Sets of indices and the five operations that relate them.

Every dimension of every tensor of a watched forward pass is one :class:`Index`, a node of one of three forms:

* ``atom``: a plain set of indices,
* ``prod``: a row-major product of other nodes (heads x head_dim),
* ``cat``: a concatenation of other nodes (the input of a dense connection).

Nodes are linked as in union-find: an atom may later be bound to any other node, so a dimension is factorised or cut
only when an operator asks for it. ``unify`` states that two nodes are the same set, index by index; ``split`` and
``cut`` make a product or a concatenation of a node; ``freeze`` keeps every leaf below a node whole; ``flag`` marks leaves whose
removal changes more than the removed values. Where two factorisations cannot be reconciled both sides are frozen, which
is always safe: the engine never guesses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from math import prod

import numpy as np

_serial = count()

Polynomial = dict[tuple["Index", ...], int]
"""A size or a cost: monomials (sorted tuples of leaves) with integer coefficients."""


class Index:
    """One set of indices. Compare nodes by identity after :func:`find`."""

    __slots__ = ("flags", "form", "frozen", "parts", "role", "serial", "size", "target")

    def __init__(self, size: int, form: str = "atom", parts: tuple[Index, ...] = (), frozen: str | None = None):
        self.size = int(size)
        self.form = form
        self.parts = parts
        self.target: Index | None = None
        self.frozen = "size 1" if frozen is None and self.size == 1 and form == "atom" else frozen
        self.flags: frozenset[str] = frozenset()
        self.role: str | None = None
        self.serial = next(_serial)

    def __repr__(self) -> str:
        node = find(self)
        if node.form == "atom":
            return f"{node.size}{'!' if node.frozen else ''}"
        return "(" + (" x " if node.form == "prod" else " + ").join(map(repr, node.parts)) + ")"


def find(node: Index) -> Index:
    """The representative of a node, with path compression."""
    root = node
    while root.target is not None:
        root = root.target
    while node.target is not None:
        node.target, node = root, node.target
    return root


def fixed(size: int, reason: str) -> Index:
    """A set of indices that cannot shrink."""
    return Index(size, frozen=reason)


def product(parts: Sequence[Index]) -> Index:
    """Row-major product; factors of size 1 are dropped."""
    kept = [part for part in parts if part.size != 1]
    if not kept:
        return parts[0] if parts else fixed(1, "size 1")
    return kept[0] if len(kept) == 1 else Index(prod(part.size for part in kept), "prod", tuple(kept))


def concatenation(parts: Sequence[Index]) -> Index:
    """Concatenation in order; empty segments are dropped."""
    kept = [part for part in parts if part.size != 0]
    return kept[0] if len(kept) == 1 else Index(sum(part.size for part in kept), "cat", tuple(kept))


def leaves(node: Index) -> Iterator[Index]:
    """Every atom below a node, repeats included."""
    stack = [node]
    while stack:
        node = find(stack.pop())
        if node.form == "atom":
            yield node
        else:
            stack.extend(reversed(node.parts))


def is_fixed(node: Index) -> bool:
    """Whether no index below the node can be removed."""
    return all(leaf.frozen for leaf in leaves(node))


def why_fixed(node: Index) -> str:
    """Why a node that is fixed cannot shrink: the reason of its first leaf that has one of its own."""
    reasons = [leaf.frozen for leaf in leaves(node) if leaf.frozen]
    return next((reason for reason in reasons if reason != "size 1"), "size 1")


def freeze(node: Index, reason: str) -> None:
    """Keep every leaf below a node whole; the first reason given is kept."""
    for leaf in leaves(node):
        leaf.frozen = leaf.frozen or reason


def flag(node: Index, mark: str) -> None:
    """Mark every leaf below a node."""
    for leaf in leaves(node):
        leaf.flags |= {mark}


def name_role(node: Index, role: str) -> None:
    """Say what a node is for (``heads``, ``head_dim``, ``groups``) where it is a single leaf without a role."""
    node = find(node)
    if node.form == "atom" and node.role is None:
        node.role = role


def unify(a: Index, b: Index) -> None:
    """State that two nodes are the same set, index by index. Irreconcilable nodes are frozen."""
    a, b = find(a), find(b)
    if a is b:
        return
    if a.size != b.size:
        _give_up(a, b, "sizes that disagree")
    elif a.form == "atom" and b.form == "atom":
        _bind(b, a) if a.serial < b.serial else _bind(a, b)
    elif is_fixed(a) and is_fixed(b):
        return  # refining spatial dimensions would be work for nothing
    elif a.form != "atom" and is_fixed(b):
        freeze(a, why_fixed(b))
    elif b.form != "atom" and is_fixed(a):
        freeze(b, why_fixed(a))
    elif a.form == "atom":
        _bind(a, b)
    elif b.form == "atom":
        _bind(b, a)
    elif a.form == b.form == "prod":
        _unify_products(a, b)
    elif a.form == b.form == "cat":
        _unify_concatenations(a, b)
    elif a.form == "prod":
        _unify_product_with_concatenation(a, b)
    else:
        _unify_product_with_concatenation(b, a)


def split(node: Index, sizes: Sequence[int]) -> list[Index]:
    """Write a node as a product of factors with the given sizes; returns the factors."""
    factors = [Index(size) for size in sizes]
    unify(node, product(factors))
    return factors


def cut(node: Index, sizes: Sequence[int]) -> list[Index]:
    """Write a node as a concatenation of segments with the given sizes; returns the segments."""
    segments = [Index(size, frozen="empty" if size == 0 else None) for size in sizes]
    unify(node, concatenation(segments))
    return segments


def reshape(dims: Sequence[Index], sizes: Sequence[int]) -> list[Index]:
    """The dimensions of a tensor after ``view``/``reshape``: dimensions are merged and split as the sizes demand."""
    result: list[Index] = []
    source = [dim for dim in dims if dim.size != 1]
    position = 0
    target = 0
    while target < len(sizes):
        if sizes[target] == 1:
            result.append(fixed(1, "size 1"))
            target += 1
            continue
        if position >= len(source):  # an empty tensor: nothing to follow
            result.append(fixed(sizes[target], "empty"))
            target += 1
            continue
        ins, outs = [source[position]], [int(sizes[target])]
        position, target = position + 1, target + 1
        have, want = ins[0].size, outs[0]
        while have != want:
            if have < want and position < len(source):
                ins.append(source[position])
                have *= source[position].size
                position += 1
            elif target < len(sizes):
                outs.append(int(sizes[target]))
                want *= outs[-1]
                target += 1
            else:
                break
        merged = product(ins)
        if len(outs) == 1:
            result.append(merged)
        elif is_fixed(merged):
            reason = why_fixed(merged)
            result.extend(fixed(size, reason) for size in outs)
        else:
            result.extend(split(merged, outs))
    return result


def positions(node: Index) -> dict[Index, np.ndarray]:
    """Where each prunable leaf's indices lie along a node: leaf -> int64 [leaf size, occurrences]."""
    found: dict[Index, list[np.ndarray]] = {}

    def walk(node: Index, where: np.ndarray) -> None:
        node = find(node)
        if node.form == "atom":
            if not node.frozen:
                found.setdefault(node, []).append(where)
        elif node.form == "cat":
            start = 0
            for part in node.parts:
                walk(part, where[start : start + part.size])
                start += part.size
        else:
            sizes = [part.size for part in node.parts]
            grid = where.reshape(*sizes, -1)
            for axis, part in enumerate(node.parts):
                walk(part, np.moveaxis(grid, axis, 0).reshape(part.size, -1))

    walk(node, np.arange(node.size, dtype=np.int64).reshape(-1, 1))
    return {leaf: np.concatenate(parts, axis=1) for leaf, parts in found.items()}


def size_polynomial(node: Index) -> Polynomial:
    """The size of a node as a polynomial in the sizes of its prunable leaves."""
    node = find(node)
    if node.form == "atom":
        return {(): node.size} if node.frozen else {(node,): 1}
    if node.form == "cat":
        total: Polynomial = {}
        for part in node.parts:
            add_into(total, size_polynomial(part))
        return total
    return multiply([size_polynomial(part) for part in node.parts])


def add_into(total: Polynomial, term: Polynomial, factor: int = 1) -> None:
    """``total += factor * term``, in place."""
    for monomial, coefficient in term.items():
        total[monomial] = total.get(monomial, 0) + factor * coefficient


def multiply(polynomials: Sequence[Polynomial]) -> Polynomial:
    """The product of polynomials."""
    result: Polynomial = {(): 1}
    for polynomial in polynomials:
        longer: Polynomial = {}
        for left, a in result.items():
            for right, b in polynomial.items():
                monomial = tuple(sorted(left + right, key=lambda leaf: leaf.serial))
                longer[monomial] = longer.get(monomial, 0) + a * b
        result = longer
    return result


def _give_up(a: Index, b: Index, why: str) -> None:
    freeze(a, why)
    freeze(b, why)


def _bind(atom: Index, node: Index) -> None:
    below = list(leaves(node))
    if atom in below:
        _give_up(atom, node, "a dimension that contains itself")
        return
    atom.target = node
    for leaf in below:
        leaf.frozen = leaf.frozen or atom.frozen
        leaf.flags |= atom.flags
    if node.form == "atom" and node.role is None:
        node.role = atom.role


def _factors(node: Index) -> list[Index]:
    node = find(node)
    if node.form != "prod":
        return [node]
    return [factor for part in node.parts for factor in _factors(part)]


def _segments(node: Index) -> list[Index]:
    node = find(node)
    if node.form != "cat":
        return [node]
    return [segment for part in node.parts for segment in _segments(part)]


def _unify_products(a: Index, b: Index) -> None:
    left, right = _factors(a), _factors(b)
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if x.size == y.size:
            unify(x, y)
            continue
        big, small, rest = (x, y, left) if x.size > y.size else (y, x, right)
        if big.size % small.size:
            for node in (a, b):
                freeze(node, "factorisations that do not divide")
            return
        first, second = split(big, (small.size, big.size // small.size))
        unify(first, small)
        rest.insert(0, second)


def _unify_concatenations(a: Index, b: Index) -> None:
    left, right = _segments(a), _segments(b)
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if x.size == y.size:
            unify(x, y)
            continue
        big, small, rest = (x, y, left) if x.size > y.size else (y, x, right)
        first, second = cut(big, (small.size, big.size - small.size))
        unify(first, small)
        rest.insert(0, second)


def _unify_product_with_concatenation(p: Index, c: Index) -> None:
    factors, segments = _factors(p), _segments(c)
    outer, inner = factors[0], product(factors[1:])
    if outer.size == len(segments) and all(segment.size == inner.size for segment in segments):
        # a packed projection seen as (3, ...): each segment is one copy of what follows the 3
        freeze(outer, "number of packed segments")
        for segment in segments:
            unify(segment, inner)
        return
    last = factors[-1]
    if all(segment.size % last.size == 0 for segment in segments):
        # every segment shares the innermost factor (channel shuffle, heads cut into groups)
        heads = []
        for segment in segments:
            head, tail = split(segment, (segment.size // last.size, last.size))
            unify(tail, last)
            heads.append(head)
        unify(product(factors[:-1]), concatenation(heads))
        return
    _give_up(p, c, "a product that does not follow the segments")
