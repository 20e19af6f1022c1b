# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Counts the n-grams of a corpus and keeps the most frequent (arXiv 2502.01637, section 3).

For each length in turn

    number   which of the frequent n-grams one shorter ends at each token    a file, int32 [tokens]
    sort     keys of those whose prefix and suffix are both frequent, a chunk of tokens at a time
    merge    the sorted chunks, a range of keys at a time; those below min_count are left out

so memory holds a few chunks for each worker. What is chosen of them takes 20 bytes more for every
frequent n-gram. Counts are exact, and ties are decided by length, then by token ids: the paper
leaves them open. n-grams are counted within documents: ours too.
"""

import contextlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from jtok_jax.data.ngrams import NONE, extended_keys, find
from jtok_jax.errors import DataError

CHUNK = 1 << 22  # tokens whose keys are sorted at once, by each worker
MOST = 1 << 31  # n-grams of one length: their numbers are int32
MERGED = 1 << 23  # entries of sorted chunks that are merged at once, by each worker


class Counted(NamedTuple):
    """n-grams of one length that are frequent: uint64 keys, sorted, and their counts."""

    keys: np.ndarray
    counts: np.ndarray


class Counter:
    """Counts n-grams of one corpus, by length.

    Args:
        tokens: ids of all documents [N], one or more, each begun by `boundary_id`.
        folder: for files that are larger than memory may be; emptied by nobody.
        progress: called with every number of tokens that is done with.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        vocab_size: int,
        boundary_id: int,
        min_count: int,
        folder: pathlib.Path,
        workers: int = 1,
        progress: Callable[[int], object] = lambda done: None,
        chunk: int = CHUNK,
        merged: int = MERGED,
    ):
        self._tokens, self._min_count, self._folder = tokens, min_count, folder
        self._form = {"vocab_size": vocab_size, "boundary_id": boundary_id}
        self._workers, self._progress = workers, progress
        self._chunk, self._merged = chunk, merged

    def count(self, max_n: int) -> list[Counted]:
        """Return the frequent n-grams of each length from 2; fewer lengths where none are left.

        Raises:
            DataError: there are 2^31 of one length, or more.
            OSError: the disk is full.
        """
        found, numbers = [], self._tokens
        with ThreadPoolExecutor(self._workers) as self._pool:
            for order in range(2, max_n + 1):
                shorter = found[-1].keys if found else None
                numbers, runs = self._sort(order, shorter, numbers)
                found.append(self._merge(order, runs))
                if len(found[-1].keys) >= MOST:
                    raise DataError(
                        f"{len(found[-1].keys):,} n-grams of {order} tokens are frequent; numbers "
                        f"are below {MOST:,}. Raise --min_count."
                    )
                if not len(found[-1].keys):
                    break
        return found

    def _sort(
        self, order: int, shorter: np.ndarray | None, before: np.ndarray
    ) -> tuple[np.ndarray, list[Counted]]:
        """Return the numbers of n-grams one shorter than `order`, and sorted chunks of keys.

        Args:
            shorter: keys of the former; None: they are tokens.
            before: numbers of n-grams shorter by two; of tokens where `shorter` is None.
        """
        size = len(self._tokens)
        numbers = before
        if shorter is not None:
            path = self._folder / f"numbers-{order - 1}.bin"
            numbers = new_file(path, np.int32, size)

        def run(first: int) -> Counted:
            last, begin = min(first + self._chunk, size), max(first - 1, 0)
            if shorter is None:
                own = before[begin:last].astype(np.int64)
            else:
                own = self._numbers(shorter, before, begin, last)
                numbers[first:last] = own[first - begin :]
            keys, there = extended_keys(own[:-1], self._tokens[begin + 1 : last], **self._form)
            keys = np.sort(keys[there & (own[1:] != NONE)])
            self._progress(last - first)
            return _counted(keys, None)

        found = self._in_order(run, range(0, size, self._chunk))
        _, runs = self._written(f"run-{order}", found)
        (self._folder / f"numbers-{order - 2}.bin").unlink(missing_ok=True)
        return numbers, runs

    def _numbers(self, keys: np.ndarray, before: np.ndarray, first: int, last: int) -> np.ndarray:
        """Return numbers of the n-grams with these keys that end at tokens first to last - 1."""
        found = np.full(last - first, NONE, np.int64)
        begin = max(first, 1)
        wanted, there = extended_keys(
            before[begin - 1 : last - 1].astype(np.int64), self._tokens[begin:last], **self._form
        )
        found[begin - first :][there] = find(keys, wanted[there])
        return found

    def _merge(self, order: int, runs: Sequence[Counted]) -> Counted:
        """Return the n-grams of all runs that occur min_count times."""

        def merge(span: tuple[int, int | None]) -> Counted:
            parts = [_between(one, *span) for one in runs]
            keys = np.concatenate([part.keys for part in parts])
            counts = np.concatenate([part.counts for part in parts])
            by_key = np.argsort(keys)
            found = _counted(keys[by_key], counts[by_key])
            frequent = found.counts >= self._min_count
            return Counted(found.keys[frequent], found.counts[frequent])

        spans = _spans(runs, self._merged)
        found, _ = self._written(f"frequent-{order}", self._in_order(merge, spans))
        for path in self._folder.glob(f"run-{order}.*"):
            path.unlink()
        return found

    def _written(self, name: str, parts: Iterable[Counted]) -> tuple[Counted, list[Counted]]:
        """Return all parts as one, and each, mapped from two files that they are written to."""
        paths, ends = [self._folder / f"{name}.{field}" for field in Counted._fields], [0]
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(path.open("wb")) for path in paths]
            for part in parts:
                for file, array in zip(files, part, strict=True):
                    array.tofile(file)
                ends.append(ends[-1] + len(part.keys))
        whole, spans = Counted(*map(_read, paths)), itertools.pairwise(ends)
        return whole, [Counted(*(x[first:end] for x in whole)) for first, end in spans]

    def _in_order(self, function: Callable, items: Iterable) -> Iterator:
        """Yield function(item) in order, a few of them under way at once."""
        waiting = []
        for item in items:
            waiting.append(self._pool.submit(function, item))
            if len(waiting) > self._workers:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def most_frequent(levels: Sequence[Counted], rows: int, *, vocab_size: int) -> list[Counted]:
    """Return the `rows` n-grams with the highest counts of all lengths, numbered anew.

    Of equal counts the shorter come first, then those with lower token ids. So every part of what
    is kept is kept: its count is no lower, and it is shorter.
    """
    least = _least_count(levels, rows)
    left = rows - sum(int((one.counts > least).sum()) for one in levels)
    kept, numbers, vocab = [], None, np.uint64(vocab_size)
    for one in levels:
        chosen, ties = one.counts > least, np.flatnonzero(one.counts == least)[:left]
        left -= len(ties)
        chosen[ties] = True
        keys = one.keys[chosen]
        if numbers is not None:
            keys = numbers[keys // vocab] * vocab + keys % vocab
        numbers = np.cumsum(chosen, dtype=np.uint64) - np.uint64(1)
        kept.append(Counted(keys, one.counts[chosen]))
    return [one for one in kept if len(one.keys)]


def _least_count(levels: Sequence[Counted], rows: int) -> int:
    """Return the highest count that `rows` n-grams have, or 0 where there are fewer."""
    low, high = 0, max((int(one.counts.max(initial=0)) for one in levels), default=0)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(int((one.counts >= middle).sum()) for one in levels) >= rows:
            low = middle
        else:
            high = middle - 1
    return low


def _counted(keys: np.ndarray, counts: np.ndarray | None) -> Counted:
    """Return sorted keys, each once, with the sum of their counts; None: each counts one."""
    first = np.ones(len(keys), bool)
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    starts = np.flatnonzero(first)
    if counts is None:
        counts = np.diff(starts, append=len(keys)).astype(np.uint64)
    elif len(starts):
        counts = np.add.reduceat(counts, starts)
    return Counted(keys[starts], counts)


def _spans(runs: Sequence[Counted], most: int) -> list[tuple[int, int | None]]:
    """Return ranges of keys, each with at most about `most` entries of all runs.

    Of every run each `step`-th key is a place to cut: between two of them are so many entries.
    """
    step = max(1, most // (2 * len(runs)))
    places = np.sort(np.concatenate([one.keys[step::step] for one in runs]))
    cuts = np.unique(places[len(runs) - 1 :: len(runs)])
    return list(itertools.pairwise([0, *map(int, cuts), None]))


def _between(run: Counted, first: int, end: int | None) -> Counted:
    begin = np.searchsorted(run.keys, np.uint64(first))
    stop = len(run.keys) if end is None else np.searchsorted(run.keys, np.uint64(end))
    return Counted(run.keys[begin:stop], run.counts[begin:stop])


def new_file(path: pathlib.Path, dtype, size: int) -> np.ndarray:
    """Return an array mapped from a new file. Raises OSError: the disk has too little room.

    Room is taken at once: a write to a mapped page that finds none would end the process.
    """
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size * np.dtype(dtype).itemsize)
    return np.memmap(path, dtype, "r+", shape=(size,))


def _read(path: pathlib.Path) -> np.ndarray:
    """Return a file of uint64, mapped."""
    return np.memmap(path, np.uint64, "r") if path.stat().st_size else np.empty(0, np.uint64)
