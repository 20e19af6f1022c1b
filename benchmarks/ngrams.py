# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Frequent n-grams: counting a corpus, and finding those of a batch: python benchmarks/ngrams.py

Tokens are those of a prepared corpus, the first of them for smaller sizes; for larger ones they
begin again, each time with other ids. Counting is timed for several sizes, with the peak memory of
a process of its own. Finding is timed in synthetic files, after their pages were dropped and again.
"""

import argparse
import mmap
import os
import pathlib
import resource
import shlex
import subprocess
import sys
import tempfile
import time

import numpy as np

from jtok_jax.data import manifest
from jtok_jax.data.ngram_counts import Counter, most_frequent
from jtok_jax.data.ngrams import Description, FrequentNgrams, open_ngrams
from jtok_jax.scone import read_tokens

VOCAB, END = 32768, 0


def count(size: int, options) -> None:
    """Print how long counting takes, and the peak memory of this process."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        tokens, vocab_size, end_id = tokens_of(options.data, size, pathlib.Path(folder))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        counter = Counter(
            tokens, vocab_size=vocab_size, boundary_id=end_id, min_count=options.min_count,
            folder=pathlib.Path(folder), workers=options.workers,
        )  # fmt: skip
        levels = counter.count(options.max_n)
        counted = time.perf_counter() - began
        kept = most_frequent(levels, options.rows, vocab_size=vocab_size)
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found, rows = sum(len(one.keys) for one in levels), sum(len(one.keys) for one in kept)
    print(
        f"{size:>12,} tokens: {seconds:6.2f} s, {size / counted / 1e6:5.2f}M tokens/s counted, "
        f"{found:>10,} frequent, {rows:>10,} kept, peak {peak / 2**20:.2f} GiB "
        f"({before / 2**20:.2f} before)",
        flush=True,
    )


def tokens_of(data: pathlib.Path, size: int, folder: pathlib.Path) -> tuple:
    """Return `size` ids mapped from a file, the vocabulary, and the token between documents."""
    found = manifest.read_manifest(data)
    own, rng = read_tokens(data, found, folder), np.random.default_rng(0)
    vocab_size, first = found.vocab_size, min(size, len(own))
    path = folder / "more.npy"
    tokens = np.lib.format.open_memmap(path, "w+", np.uint16, (size,))
    tokens[:first] = own[:first]
    for start in range(first, size, first):
        others = rng.permutation(vocab_size).astype(np.uint16)
        place = int(np.flatnonzero(others == found.end_id)[0])
        others[[found.end_id, place]] = others[[place, found.end_id]]
        tokens[start : start + first] = others[own[: min(first, size - start)]]
    return np.load(path, mmap_mode="r"), vocab_size, found.end_id


def synthetic(rows: int, path: pathlib.Path) -> None:
    """Write a file of so many n-grams of 2 and 3 tokens."""
    rng = np.random.default_rng(1)
    pairs = np.unique(rng.integers(0, VOCAB * VOCAB, rows // 2))
    more = rng.integers(0, len(pairs), rows) * VOCAB + rng.integers(0, VOCAB, rows)
    triples = np.unique(more)[: rows - len(pairs)]
    keys = [np.uint64(pairs), np.uint64(triples)]
    counts = [np.full(len(one), 5, np.uint64) for one in keys]
    numbers = tuple(map(len, keys))
    FrequentNgrams(Description(numbers, VOCAB, END, 5, "", ""), keys, counts).save(path)


def find(rows: int, options) -> None:
    """Print how long a token and a batch take, of pages on the disk and in memory."""
    rng = np.random.default_rng(2)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = pathlib.Path(folder) / "ngrams"
        synthetic(rows, path)
        began = time.perf_counter()
        ngrams = open_ngrams(path)
        opened = time.perf_counter() - began
        some = ngrams.tokens(rng.integers(0, len(ngrams), 64 * 512))[0][:, :2]
        shapes = {"a token": (1, 2), "64 tokens": (64, 2), "32,768 tokens": (64, 512)}
        for name, shape in shapes.items():
            times = {"cold": [], "warm": []}
            for number in range(options.rounds):
                ids = np.roll(some, 97 * number, axis=0).reshape(-1)[: shape[0] * shape[1]]
                ids = ids.reshape(shape).astype(np.int32)
                drop_pages(path, ngrams)
                for kind in times:
                    began = time.perf_counter()
                    ngrams.match(ids)
                    times[kind].append(time.perf_counter() - began)
            cold, warm = (np.median(one) * 1e6 for one in times.values())
            print(f"{rows:>12,} rows, {name:>13}: {cold:10.0f} us cold, {warm:8.0f} us warm")
        print(f"{rows:>12,} rows: opened and verified in {opened:.2f} s", flush=True)


def drop_pages(path: pathlib.Path, ngrams: FrequentNgrams) -> None:
    """Drop the pages of a file that this process and the system keep in memory."""
    ngrams.keys[0]._mmap.madvise(mmap.MADV_DONTNEED)
    drop_from_cache(path)


def drop_from_cache(path: pathlib.Path) -> None:
    """Drop the pages of a file that the system keeps in memory, and no process has mapped."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    option = parser.add_argument
    option("--data", type=pathlib.Path, required=True, help="folder of jtok_jax.prepare")
    option("--sizes", default="1000000,4000000,10000000,40000000", help="tokens to count")
    option("--found", default="1000000,10000000", help="rows of files to find n-grams in")
    option("--rows", type=int, default=1_000_000)
    option("--min_count", type=int, default=5)
    option("--max_n", type=int, default=5)
    option("--workers", type=int, default=os.cpu_count())
    option("--rounds", type=int, default=15)
    option("--folder", default=None, help="for temporary files")
    option("--one", type=int, help="count so many tokens in this process, and end")
    options = parser.parse_args()
    if options.one:
        return count(options.one, options)
    print(f"$ python {shlex.join(sys.argv)}\nNumPy {np.__version__}, {options.workers} workers")
    for size in filter(None, options.sizes.split(",")):
        subprocess.run([sys.executable, *sys.argv, f"--one={size}"], check=True)
    for rows in filter(None, options.found.split(",")):
        find(int(rows), options)


if __name__ == "__main__":
    main()
