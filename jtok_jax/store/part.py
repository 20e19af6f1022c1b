# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The part of an array by rows that a process holds: all rows, and what its devices have of each.

Devices split rows by columns and experts, never the rows among them. A process holds what its own
devices have, side by side in the order of the whole: of columns 0-3 and 8-11 an array of 8 columns.
"""

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from jtok_jax.errors import ConfigError

Span = tuple[int, int]  # the first place, and the one after the last
Region = tuple[Span, ...]  # along each axis
Slices = tuple[slice, ...]


class Part:
    """Describes the part of rows that this process holds; holds no array.

    holders: the processes that hold each region of a row, by region.
    local_regions: those that this process holds.
    shape: of what it holds of a row.
    sharding: of rows on the devices.
    """

    def __init__(self, row: Sequence[int], sharding: NamedSharding, *, axis: int):
        """Find what the devices of this process have of each row.

        Args:
            row: shape of a row, [G, (M,) (D)].
            sharding: of an array on the devices, [G, (M,) n (, D)].
            axis: of n there.

        Raises:
            ConfigError: the regions of a process are no product of experts and columns.
        """
        self._row, self.sharding, self._axis = tuple(row), sharding, axis
        self.holders: dict[Region, set[int]] = {}
        if sharding.is_fully_addressable:  # as one piece, however its devices split it
            self.holders[tuple((0, size) for size in row)] = {jax.process_index()}
        else:
            for device, index in sharding.devices_indices_map(self._whole(1)).items():
                region = self._region(index)
                self.holders.setdefault(region, set()).add(device.process_index)
        self.local_regions = [one for one, of in self.holders.items() if jax.process_index() in of]
        self._kept = [sorted(set(spans)) for spans in zip(*self.local_regions, strict=True)]
        self.shape = tuple(sum(end - first for first, end in spans) for spans in self._kept)
        if np.prod([len(spans) for spans in self._kept]) != len(self.local_regions):
            raise ConfigError(
                "mesh.table_memory is host, but the experts and columns that devices of this "
                "process have form no block. Name other axes in mesh.table_columns and "
                "mesh.table_experts, or set mesh.table_memory=device."
            )

    def _whole(self, rows: int) -> tuple[int, ...]:
        """Return the shape of so many rows on the devices."""
        return *self._row[: self._axis], rows, *self._row[self._axis :]

    def _region(self, index: Slices) -> Region:
        """Return what an index of an array on the devices takes of a row."""
        of_row = *index[: self._axis], *index[self._axis + 1 :]
        return tuple(one.indices(size)[:2] for one, size in zip(of_row, self._row, strict=True))

    @property
    def is_whole(self) -> bool:
        """Return whether this process holds all of a row."""
        return self.shape == self._row

    def replica(self, region: Region) -> tuple[int, int]:
        """Return which replica of a region this process holds, and how many there are."""
        holders = sorted(self.holders[region])
        return holders.index(jax.process_index()), len(holders)

    def local_slices(self, region: Region) -> Slices:
        """Return where the local array has a region, or a part of one."""
        found = []
        for (first, end), spans in zip(region, self._kept, strict=True):
            place = 0
            for start, stop in spans:
                if start <= first < stop:
                    break
                place += stop - start
            found.append(slice(place + first - start, place + end - start))
        return tuple(found)

    def local_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return what this process holds of whole rows [n, ...]."""
        if self.is_whole:
            return rows
        out = np.empty((len(rows), *self.shape), rows.dtype)
        for here, there in self.overlaps((0,) * len(self._row), self._row):
            out[:, *here] = rows[:, *there]
        return out

    def overlaps(
        self, begin: Sequence[int], shape: Sequence[int]
    ) -> Iterator[tuple[Slices, Slices]]:
        """Yield (local slices, slices of the piece) of all that a piece of rows shares with this.

        Args:
            begin: where the piece begins in a row. shape: of a row of the piece.
        """
        for region in self.local_regions:
            if found := intersection(region, begin, shape):
                yield self.local_slices(found), relative_slices(found, begin)

    def stacked_shape(self, count: int) -> tuple[int, ...]:
        """Return the shape of so many rows that this process holds, [G, (M,) n (, D)]."""
        return *self.shape[: self._axis], count, *self.shape[self._axis :]

    def to_devices(self, rows: np.ndarray) -> jax.Array:
        """Return stacked rows of this process as part of an array on the devices of all."""
        place = lambda index: rows[self._local(self._region(index))]
        shape = self._whole(rows.shape[self._axis])
        return jax.make_array_from_callback(shape, self.sharding, place)

    def from_devices(self, array: jax.Array) -> np.ndarray:
        """Return what this process holds of stacked rows on the devices of all; waits for them."""
        shards, shape = array.addressable_shards, self.stacked_shape(array.shape[self._axis])
        first = np.asarray(shards[0].data)
        if first.shape == shape:
            return first
        out = np.empty(shape, array.dtype)
        for region, shard in {self._region(shard.index): shard for shard in shards}.items():
            out[self._local(region)] = np.asarray(shard.data)
        return out

    def _local(self, region: Region) -> Slices:
        """Return where stacked rows that this process holds have a region."""
        found = self.local_slices(region)
        return *found[: self._axis], slice(None), *found[self._axis :]


def of_all_processes(values: np.ndarray) -> np.ndarray:
    """Return an array [P, ...] of what every process passed here, all of one shape; all call it."""
    if jax.process_count() == 1:
        return values[None]
    return multihost_utils.process_allgather(values)


def intersection(region: Region, begin: Sequence[int], shape: Sequence[int]) -> Region | None:
    """Return what a region has of a piece of `shape` that begins at `begin`; None: nothing."""
    found = tuple(
        (max(first, start), min(end, start + size))
        for (first, end), start, size in zip(region, begin, shape, strict=True)
    )
    return found if all(first < end for first, end in found) else None


def relative_slices(region: Region, begin: Sequence[int]) -> Slices:
    """Return where a region lies in a piece that begins at `begin`."""
    return tuple(slice(a - x, b - x) for (a, b), x in zip(region, begin, strict=True))
