# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Documents of token ids made elsewhere: raw .bin, .npy, and Megatron's .bin beside an .idx.

A raw file may begin with the header of llm.c.
"""

import itertools
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from jtok_jax.data.corpus import Document
from jtok_jax.errors import DataError

DTYPES = ("uint8", "uint16", "uint32", "int32", "int64")
CHUNK = 1 << 24  # ids looked at together
MEGATRON_MAGIC = b"MMIDIDX\0\0"
MEGATRON_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
LLMC_MAGIC, LLMC_HEADER = (20240520, 20240801), 256  # of GPT-2 and Llama 3; int32 numbers


def read_ids(
    files: list[pathlib.Path], *, dtype: str, end_id: int, vocab_size: int
) -> Iterator[Document]:
    """Yield every document of `files` in order: the ids between two end ids, without these.

    Raises DataError: ids are not of `dtype` or outside the vocabulary, or a file is damaged.
    """
    before = 0
    for path in files:
        size = path.stat().st_size
        if path.suffix == ".idx" and path.with_suffix(".bin") in files:
            before += size
            continue
        try:
            ids, bounds = _open(path)(path, dtype)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read as token ids ({error}).") from error
        if ids.dtype != dtype:
            raise DataError(f"{path} holds {ids.dtype}, --ids is {dtype}.\nPass --ids={ids.dtype}.")
        for start, stop in _documents(ids, bounds, end_id):
            document = ids[start:stop]
            if outside := _outside(document, vocab_size):
                place, found = outside
                raise DataError(
                    f"{path}: token id {found} at place {start + place:,}; expected 0 to "
                    f"{vocab_size - 1}.\nCheck --ids={dtype} and the vocabulary."
                )
            yield Document(document, before + size * stop // len(ids))
        before += size


def _open(path: pathlib.Path):
    if path.suffix == ".npy":
        return _numpy
    if path.suffix != ".bin":
        raise DataError(f"{path}: token ids are read from .bin and .npy; found {path.suffix!r}.")
    return _megatron if path.with_suffix(".idx").exists() else _raw


def _numpy(path: pathlib.Path, dtype: str) -> tuple[np.ndarray, Sequence[int]]:
    ids = np.load(path, mmap_mode="r", allow_pickle=False).reshape(-1)
    return ids, (0, len(ids))


def _raw(path: pathlib.Path, dtype: str) -> tuple[np.ndarray, Sequence[int]]:
    with path.open("rb") as file:
        header = int.from_bytes(file.read(4), "little")
    ids = np.memmap(path, f"<{np.dtype(dtype).str[1:]}", "r")
    if header in LLMC_MAGIC:
        ids = ids[4 * LLMC_HEADER // ids.itemsize :]
    return ids, (0, len(ids))


def _megatron(path: pathlib.Path, dtype: str) -> tuple[np.ndarray, Sequence[int]]:
    index = path.with_suffix(".idx").read_bytes()
    start = len(MEGATRON_MAGIC)
    if not index.startswith(MEGATRON_MAGIC) or index[start + 8] not in MEGATRON_DTYPES:
        raise DataError(f"{path.with_suffix('.idx')}: not an index of Megatron's token ids.")
    ids = np.memmap(path, MEGATRON_DTYPES[index[start + 8]], "r")
    sequences, documents = np.frombuffer(index, "<i8", 2, start + 9)
    lengths = np.frombuffer(index, "<i4", sequences, start + 25)
    place = start + 25 + 12 * sequences  # after the lengths and the addresses of the sequences
    bounds = np.frombuffer(index, "<i8", documents, place)
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    if ends[-1] != len(ids):
        raise DataError(f"{path} holds {len(ids):,} token ids, its .idx says {ends[-1]:,}.")
    return ids, ends[bounds].tolist()


def _documents(ids: np.ndarray, bounds: Sequence[int], end_id: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of what lies between end ids and `bounds`, and is not empty."""
    for start, upper in itertools.pairwise(bounds):
        for first in range(start, upper, CHUNK):
            chunk = ids[first : min(first + CHUNK, upper)]
            for end in (first + np.flatnonzero(chunk == end_id)).tolist():
                if end > start:
                    yield start, end
                start = end + 1
        if upper > start:
            yield start, upper


def _outside(ids: np.ndarray, vocab_size: int) -> tuple[int, int] | None:
    """Return (place, id) of the first id outside the vocabulary."""
    for first in range(0, len(ids), CHUNK):
        chunk = ids[first : first + CHUNK]
        if chunk.max() >= vocab_size or chunk.min() < 0:
            place = int(np.argmax((chunk < 0) | (chunk >= vocab_size)))
            return first + place, int(chunk[place])
    return None
