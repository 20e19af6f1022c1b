# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Arrays of a checkpoint that lie in host memory: written and read piece by piece, by TensorStore.

They may be larger than memory, and each of several processes may have a part. Orbax reads and
writes them whole, from one process. In a checkpoint all are alike: arrays of Zarr 3.
"""

import collections
import itertools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import tensorstore
from orbax.checkpoint.experimental.v1._src.serialization import numpy_leaf_handler, registry

from jtok_jax.store.part import Region, Span

STATE = "state"  # Orbax's folder of all arrays
PIECE = 16 << 20  # bytes
MAX_WRITES = 8  # pieces that are written at once


class Pieces:
    """Holds views of those regions of an array that are in this process.

    shape, dtype: of the whole array.
    regions: all there are; None where another process holds one.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: np.dtype,
        regions: Mapping[Region, np.ndarray | None],
        *,
        replicas: Mapping[Region, tuple[int, int]],
        rows: int,
    ):
        """Describe an array by its regions.

        Args:
            replicas: of each local region, see `Part.replica`; these share the writing.
            rows: the axis of rows.
        """
        self.shape, self.dtype, self.rows = tuple(shape), np.dtype(dtype), rows
        self.regions, self._replicas = regions, replicas

    @classmethod
    def of(cls, array: np.ndarray) -> "Pieces":
        """Return the pieces of an array that this process holds as a whole."""
        region = tuple((0, size) for size in array.shape)
        rows = int(np.argmax(array.shape)) if array.ndim else 0  # its longest axis
        return cls(array.shape, array.dtype, {region: array}, replicas={region: (0, 1)}, rows=rows)

    def local_pieces(self) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """Yield (where it begins, piece) of all local regions."""
        for region, array in self.regions.items():
            if array is not None:
                yield from self.split(region)

    def split(self, region: Region) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """Yield (where it begins, piece) of a local region."""
        begin, array = tuple(first for first, _ in region), self.regions[region]
        if array.nbytes <= PIECE:
            yield begin, array
            return
        size = self._rows_of(array.shape)
        for first in range(0, array.shape[self.rows], size):
            part = array[(slice(None),) * self.rows + (slice(first, first + size),)]
            yield (*begin[: self.rows], begin[self.rows] + first, *begin[self.rows + 1 :]), part

    async def write(self, folder: pathlib.Path) -> None:
        """Write local pieces into the Zarr array that all processes share; each is a chunk.

        Few are written at once: where the disk is slow, encoded ones wait in memory.
        """
        region = next(iter(self.regions))  # all are of one shape
        chunk = [end - first for first, end in region]
        if chunk:
            chunk[self.rows] = min(chunk[self.rows], self._rows_of(chunk))
        configuration = lambda **values: {"configuration": values}
        array = await tensorstore.open({
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{folder}/"},
            "metadata": {
                "shape": self.shape,
                "data_type": self.dtype.name,
                "chunk_grid": {"name": "regular"} | configuration(chunk_shape=chunk),
                "codecs": [
                    {"name": "bytes"} | configuration(endian="little"),
                    {"name": "zstd"} | configuration(level=3),
                ],
            },
        }, create=True, open=True)  # fmt: skip
        writes = collections.deque()
        for region, (replica, count) in self._replicas.items():
            for begin, piece in itertools.islice(self.split(region), replica, None, count):
                place = zip(begin, piece.shape, strict=True)
                to = array[tuple(slice(first, first + size) for first, size in place)]
                if len(writes) == MAX_WRITES:
                    await writes.popleft()
                writes.append(to.write(piece, can_reference_source_data_indefinitely=True))
        for writing in writes:
            await writing

    def _rows_of(self, shape: Sequence[int]) -> int:
        """Return how many rows of a region of `shape` are a piece."""
        row = math.prod(shape) // max(1, shape[self.rows]) * self.dtype.itemsize
        return max(1, PIECE // max(1, row))


class _Handler(numpy_leaf_handler.NumpyLeafHandler):
    """Lets Orbax save `Pieces` among other arrays; it loads them as arrays of NumPy, or others."""

    async def serialize(self, params, serialization_context):
        """Return what writes them, begun when it is awaited."""

        async def write() -> None:
            folder = await serialization_context.parent_dir.await_creation()
            for param in params:  # one after the other, each by several threads
                await param.value.write(pathlib.Path(folder) / param.name)

        return write()


# Orbax 0.12 has no public way to add a leaf that its own handler of trees takes.
registry.STANDARD_TYPE_AND_ABSTRACT_TYPE_AND_TYPESTR_TO_HANDLER.append(
    (Pieces, Pieces, ["np.ndarray"], _Handler)
)


def read_pieces(
    checkpoint: pathlib.Path, name: str, regions: Sequence[Region] = ()
) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Yield (where it begins, piece) of all that has some of `regions` of an array; none: of all.

    Pieces are the chunks that it was written in; neighbours along the last axis are one. So each is
    read once, and memory holds one: of an array that devices wrote, the part of one device or more.

    Raises ValueError: it is damaged.
    """
    folder = checkpoint / STATE
    if json.loads((folder / "_METADATA").read_text())["use_ocdbt"]:
        place = {"driver": "ocdbt", "base": f"file://{folder}/", "path": f"{name}/"}
    else:
        place = {"driver": "file", "path": f"{folder / name}/"}
    found = tensorstore.open({"driver": "zarr3", "kvstore": place}, read=True).result()
    regions = regions or [tuple((0, size) for size in found.shape)]
    wanted = zip(*regions, strict=True)
    chunks = zip(wanted, found.chunk_layout.read_chunk.shape, found.shape, strict=True)
    spans = [_overlapping_chunks(*of_axis) for of_axis in chunks]
    for span in itertools.product(*spans[:-1], _merge_adjacent(spans[-1])):
        place = tuple(slice(first, end) for first, end in span)
        yield tuple(first for first, _ in span), found[place].read().result()


def _overlapping_chunks(wanted: Sequence[Span], size: int, length: int) -> list[Span]:
    """Return the chunks of an axis that have some of the spans wanted."""
    found = [(first, min(first + size, length)) for first in range(0, length, size)]
    return [(first, end) for first, end in found if any(a < end and first < b for a, b in wanted)]


def _merge_adjacent(spans: Sequence[Span]) -> list[Span]:
    """Return spans, with those that follow one another as one."""
    found = []
    for first, end in spans:
        before = found.pop() if found and found[-1][1] == first else (first, first)
        found.append((before[0], end))
    return found
