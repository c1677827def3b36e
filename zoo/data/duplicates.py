"""Copies and near-copies among images: found by hash, confirmed by correlation, in nearly linear time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from zoo.data.pictures import BLOCK, SMALL_SIDE, Small, blocks

Ints = np.ndarray[Any, np.dtype[np.int64]]

HASH_RADIUS = 7  # bits of 64
MIN_CORRELATION = 0.99
_NEARER_THAN_USUAL = 0.1  # of the distance that two pictures of a class usually have
_FLAT = 2.0  # grey levels of standard deviation, below which a hash says nothing
_CHUNKS, _CHUNK_BITS = 4, 16
_BLOCK = 1 << 18  # candidate pairs at once: 20 MB
_CONFIRM_BLOCK = 1 << 13
_CROWD = 1000  # different pictures of one hash that are compared each with each


def exact_pairs(keys: Sequence[str] | np.ndarray[Any, Any]) -> Ints:
    """Return the pairs (P, 2) of places whose keys are equal, sorted.

    Of m equal keys all m (m - 1) / 2 pairs are given up to 50 of a kind; of more, each with its first.

    >>> exact_pairs(["x", "y", "x"]).tolist()
    [[0, 2]]
    """
    codes = key_codes(keys)
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1))
    sizes = np.diff(starts, append=len(codes))
    found = [np.zeros((0, 2), np.int64)]
    for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
        same = order[start : start + size]
        one, other = np.triu_indices(size, 1) if size <= 50 else (np.zeros(size - 1, int), np.arange(1, size))
        found.append(np.stack([same[one], same[other]], axis=1))
    pairs = np.concatenate(found)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def key_codes(keys: Sequence[str] | np.ndarray[Any, Any]) -> Ints:
    """Return a number for each key, the same for equal ones: (N,), counted from 0 in the order of their first place.

    >>> key_codes(["x", "y", "x"]).tolist()
    [0, 1, 0]
    """
    import pandas as pd

    return pd.factorize(np.asarray(keys, dtype=object))[0].astype(np.int64)


def near_pairs(
    hashes: np.ndarray[Any, Any],
    small: Small,
    labels: Sequence[str] | np.ndarray[Any, Any],
    keys: Sequence[str] | np.ndarray[Any, Any],
) -> Ints:
    """Return the pairs (P, 2) of near-duplicates that are no exact copies, first place below the second.

    hashes: (N,) uint64 perceptual hashes; small: (N, 32, 32) uint8; labels: the classes; keys: what is equal for
    exact copies, of which the first alone is looked at. Near-duplicates differ in at most 7 bits, correlate by
    0.99 or more, and are ten times nearer to each other than two pictures of their class usually are: where all
    pictures of a class are alike, likeness proves nothing. Pictures without contrast are never near-duplicates.
    """
    _, first = np.unique(key_codes(keys), return_index=True)
    contrast = np.concatenate([np.zeros(0), *(block.std(axis=1, dtype=np.float32) for block in blocks(small))])
    chosen = np.sort(first[contrast[first] >= _FLAT])
    if len(chosen) < 2:
        return np.zeros((0, 2), np.int64)
    allowed = _allowed_distance(small, key_codes(labels), chosen)
    found = []
    candidates = _candidates(hashes[chosen], small, chosen)
    for block in (part for pairs in candidates for part in _blocks(pairs, _CONFIRM_BLOCK)):
        one, other = chosen[block[:, 0]], chosen[block[:, 1]]
        distance = 1.0 - np.einsum("ij,ij->i", standardised(small[one]), standardised(small[other]))
        found.append(np.stack([one, other], axis=1)[distance <= np.minimum(allowed[one], allowed[other])])
    pairs = np.concatenate(found) if found else np.zeros((0, 2), np.int64)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def candidate_pairs(hashes: np.ndarray[Any, Any], small: Small | None = None) -> Ints:
    """Return all pairs (P, 2) of places whose 64-bit hashes differ in at most 7 bits.

    Multi-index hashing (Norouzi, Punjani and Fleet 2012, arXiv 1307.2982): of four chunks of 16 bits at least one
    differs in at most one bit, so only hashes that share such a chunk are compared. Equal hashes of more than
    1000 places are compared only with their neighbours in brightness, which needs `small` (N, 32, 32).
    """
    found = list(_candidates(hashes, small, np.arange(len(hashes))))
    return np.concatenate([np.zeros((0, 2), np.int64), *found])


def _candidates(hashes: np.ndarray[Any, Any], small: Small | None, chosen: Ints) -> Iterator[Ints]:
    """Yield the candidate pairs in blocks, each pair once with its smaller place first; chosen: places in `small`."""
    if len(hashes) == 0:
        return
    members = np.argsort(hashes, kind="stable")
    in_order = hashes[members]
    start = np.flatnonzero(np.concatenate([[True], in_order[1:] != in_order[:-1], [True]]))
    near = _near_values(in_order[start[:-1]])
    del in_order
    start, sizes = start.astype(np.int32), np.diff(start).astype(np.int32)
    for value in np.flatnonzero(sizes > 1).tolist():
        yield np.sort(_within(members[start[value] : start[value + 1]], small, chosen), axis=1)
    single = sizes[near].max(axis=1, initial=0) == 1
    yield np.sort(members[start[near[single]]], axis=1)
    for one, other in near[~single].tolist():
        left, right = (members[start[each] : start[each + 1]][:_CROWD] for each in (one, other))
        yield np.sort(np.stack([np.repeat(left, len(right)), np.tile(right, len(left))], axis=1), axis=1)


def _within(members: Ints, small: Small | None, chosen: Ints) -> Ints:
    """Return the pairs of places that share a hash; of a crowd, each with its 50 nearest in brightness."""
    if len(members) <= _CROWD:
        one, other = np.triu_indices(len(members), 1)
        return np.stack([members[one], members[other]], axis=1)
    if small is not None:
        bright = [small[chosen[part]].reshape(len(part), -1).mean(axis=1) for part in _blocks(members, BLOCK)]
        members = members[np.argsort(np.concatenate(bright), kind="stable")]
    return np.concatenate([np.stack([members[:-step], members[step:]], axis=1) for step in range(1, 51)])


def _near_values(values: np.ndarray[Any, Any]) -> Ints:
    """Return the pairs (P, 2) of different hashes, sorted ones, within the radius."""
    found = []
    for chunk in range(_CHUNKS):
        part = _chunk(values, chunk)
        order = np.argsort(part, kind="stable")
        in_order = part[order]
        for flipped in (0, *(1 << bit for bit in range(_CHUNK_BITS))):
            wanted = in_order ^ np.uint16(flipped)
            # Each pair of chunks once: the partner is the larger one, or stands further on.
            from_ = np.searchsorted(in_order, wanted, "left")
            to = np.searchsorted(in_order, wanted, "right")
            if flipped == 0:
                from_ = np.arange(len(values)) + 1
            else:
                to = np.where(wanted > in_order, to, from_)
            for one, other in _expand(from_, to):
                left, right = order[one], order[other]
                close = np.bitwise_count(values[left] ^ values[right]) <= HASH_RADIUS
                found.append(np.stack([left[close], right[close]], axis=1))
    pairs = np.concatenate([np.zeros((0, 2), np.int64), *found])
    pairs.sort(axis=1)
    numbers = np.unique(pairs[:, 0] * np.int64(len(values)) + pairs[:, 1])
    return np.stack([numbers // len(values), numbers % len(values)], axis=1)


def _chunk(values: np.ndarray[Any, Any], chunk: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Return every fourth bit of the hashes, so that each chunk has coarse and fine ones."""
    part = np.zeros(len(values), np.uint16)
    for bit in range(_CHUNK_BITS):
        part |= ((values >> np.uint64(_CHUNKS * bit + chunk)) & np.uint64(1)).astype(np.uint16) << np.uint16(bit)
    return part


def _expand(start: Ints, stop: Ints) -> Iterator[tuple[Ints, Ints]]:
    """Yield (place, partner) for every place and all partners from its start up to its stop, in blocks."""
    counts = np.maximum(0, stop - start)
    ends = np.cumsum(counts)
    low = 0
    while low < len(counts):
        before = ends[low - 1] if low else 0
        high = max(low + 1, int(np.searchsorted(ends, before + _BLOCK, "right")))
        part = counts[low:high]
        total = int(part.sum())
        if total:
            one = np.repeat(np.arange(low, high), part)
            within = np.arange(total) - np.repeat(np.cumsum(part) - part, part)
            yield one, start[one] + within
        low = high


def _blocks(pairs: Ints, size: int) -> Iterator[Ints]:
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]


def standardised(small: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return pictures as rows of mean 0 and length 1, whose products are correlations."""
    values = np.empty((len(small), SMALL_SIDE * SMALL_SIDE), np.float32)
    for start, block in enumerate(blocks(small)):
        rows = values[start * BLOCK : start * BLOCK + len(block)]
        rows[:] = block
        rows -= rows.mean(axis=1, keepdims=True)
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
    return values


def _allowed_distance(
    small: Small, labels: np.ndarray[Any, Any], chosen: Ints
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return for each place how far (1 - correlation) a near-duplicate may be: by its class, 0.01 at most."""
    allowed = np.full(len(small), 1 - MIN_CORRELATION, np.float32)
    overall = _usual_distance(small, chosen)
    for label in np.unique(labels[chosen]):
        of_class = chosen[labels[chosen] == label]
        usual = _usual_distance(small, of_class) if len(of_class) >= 8 else overall
        allowed[of_class] = min(1 - MIN_CORRELATION, _NEARER_THAN_USUAL * usual)
    return allowed


def _usual_distance(small: Small, places: Ints) -> float:
    """Return the median distance of pairs among at most 64 pictures, spread evenly over the places."""
    if len(places) < 2:
        return 1.0
    values = standardised(small[places[np.linspace(0, len(places) - 1, min(64, len(places))).astype(int)]])
    one, other = np.triu_indices(len(values), 1)
    return float(np.median(1.0 - (values @ values.T)[one, other]))


def components(count: int, *pairs: Ints) -> Ints:
    """Return (count,) component numbers of places that pairs join, counted from 0 in the order of their first place.

    >>> components(4, np.array([[0, 2]]), np.array([[2, 3]])).tolist()
    [0, 1, 0, 0]
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    joined = np.concatenate([np.zeros((0, 2), np.int64), *pairs])
    graph = coo_matrix((np.ones(len(joined), bool), (joined[:, 0], joined[:, 1])), (count, count))
    found: Ints = connected_components(graph, directed=False)[1].astype(np.int64)
    return found
