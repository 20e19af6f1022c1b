# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Brings the rows of tables in host memory to the devices, ahead of the steps that need them.

    batch t + 1 --RowReader--> rows of t + 1
    step t --> new rows of t --merge into the rows of t + 1--> step t + 1
                            \\--HostTables.write--> store

One thread reads and writes in the order that both were asked for. A batch read ahead lacks what
steps under way will change of its rows: their results are merged on the device, in order. So the
rows of a step are those it would have found on the device, whatever is read ahead.
"""

import collections
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jtok_jax.config import Config
from jtok_jax.data.loader import Batch, check_unique
from jtok_jax.mesh import put_whole
from jtok_jax.model.params import Params, declared_tables
from jtok_jax.model.tables import ROWS, SomeRows
from jtok_jax.store.reader import Ids, RowReader
from jtok_jax.store.rows import Leaves
from jtok_jax.store.tables import HostTables


class _Ready(NamedTuple):
    """Rows of a batch on the devices, and what they lack."""

    ids: Ids
    rows: SomeRows
    # For each step under way when they were read, the earliest first: the place of every row in
    # the result of that step, -1 where it is not there; int32 [U] by stream.
    places: list[dict[str, jax.Array]]


class RowFeed:
    """Hands rows of one store to the steps on a mesh, and takes the new ones back."""

    def __init__(self, config: Config, mesh: Mesh, store: HostTables):
        self._config, self._mesh, self._store = config, mesh, store
        self._tables, self._reader = declared_tables(config.model), RowReader(config, mesh, store)
        self._thread = ThreadPoolExecutor(1, "rows")
        depth = config.mesh.table_prefetch
        self._earlier = collections.deque(maxlen=depth)  # ids of the batches read last
        self._results = collections.deque(maxlen=depth)  # leaves of the last steps
        self._taken: Ids = {}  # ids of the step under way
        self._last_write, self._failed = self._thread.submit(lambda: None), None
        self._merge = jax.jit(_merge, out_shardings=store.shardings, donate_argnums=0)

    def find_ngrams_with(self, params: Params) -> None:
        """Take from a model's parameters what frequent n-grams are found with."""
        self._reader.find_ngrams_with(params)

    def fetch(self, ids_BT: np.ndarray) -> SomeRows:
        """Return the rows of a batch that changes none, after all changes under way."""
        self.settle()
        return self._thread.submit(self._reader.fetch, ids_BT).result()

    def read_ahead(
        self, batches: Iterator[Batch], *, first_step: int
    ) -> Iterator[tuple[Batch, tuple[SomeRows]]]:
        """Yield each batch with its rows; before the next, those a step makes are given back.

        Raises:
            DataError: a batch has more different ids than train.max_unique_ids.
        """
        step, ahead = first_step, collections.deque()
        for batch in batches:
            ahead.append((batch, self._thread.submit(self._read, batch.ids_BT, step)))
            step += 1
            if len(ahead) > self._config.mesh.table_prefetch:
                yield self._finish(*ahead.popleft())
        while ahead:
            yield self._finish(*ahead.popleft())

    def give_back(self, leaves: Leaves) -> None:
        """Write the rows that a step made of those it was handed, as soon as they are there."""
        if self._failed:
            raise self._failed
        self._results.append(leaves)
        self._last_write = self._thread.submit(self._write, self._taken, leaves)

    def settle(self) -> None:
        """Wait until all that was given back is in the store. Raises what a write failed of."""
        self._last_write.result()
        if self._failed:
            raise self._failed

    def close(self) -> None:
        """End the thread; what was given back is written, what is read ahead forgotten."""
        self._thread.shutdown()

    # ------------------------------------------------------------------ on the thread

    @jax.profiler.annotate_function
    def _read(self, ids_BT: np.ndarray, step: int) -> _Ready:
        places, ids = self._reader.unique(ids_BT)
        if "token" in ids:
            check_unique(len(ids["token"]), self._config, step)
        room = {name: self._config.unique_rows(name) for name in ids}
        rows = self._reader.put(places, ids, room)
        found = [_found_in(earlier, ids, room) for earlier in self._earlier]
        self._earlier.append(ids)
        return _Ready(ids, rows, jax.tree.map(lambda x: put_whole(self._mesh, x), found))

    def _write(self, ids: Ids, leaves: Leaves) -> None:
        """Write rows; after one write that failed none is made, as later ones build on it."""
        if self._failed:
            return
        try:
            jax.block_until_ready(leaves)
            self._store.write(ids, leaves)
        except Exception as error:
            self._failed = error

    # ------------------------------------------------------------------ before a step

    def _finish(self, batch: Batch, reading) -> tuple[Batch, tuple[SomeRows]]:
        ready = reading.result()
        leaves = ready.rows.leaves
        results = list(self._results)[len(self._results) - len(ready.places) :]
        for places, result in zip(ready.places, results, strict=True):
            of_table = {name: places[table.stream] for name, table in self._tables.items()}
            leaves = self._merge(leaves, result, of_table)
        self._taken = ready.ids
        return batch, (ready.rows._replace(leaves=leaves),)


def _found_in(earlier: Ids, ids: Ids, room: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Return the place of every id among earlier ones, -1 where it is not; int32 [room]."""
    found = {}
    for name, wanted in ids.items():
        place = np.searchsorted(earlier[name], wanted).clip(max=len(earlier[name]) - 1)
        there = np.where(earlier[name][place] == wanted, place, -1).astype(np.int32)
        found[name] = np.pad(there, (0, room[name] - len(there)), constant_values=-1)
    return found


def _merge(leaves: Leaves, result: Leaves, places: dict[str, jax.Array]) -> Leaves:
    """Return rows, in place of which stand those of `result` that are at one of `places`."""

    def merged(row, new, place_U, axis):
        there = (place_U >= 0).reshape(-1, *(1,) * (row.ndim - axis - 1))
        return jnp.where(there, new.take(place_U, axis, mode="clip"), row)

    return {
        name: {
            leaf: merged(row, result[name][leaf], places[name], one[ROWS].ndim - 2)
            for leaf, row in one.items()
        }
        for name, one in leaves.items()
    }
