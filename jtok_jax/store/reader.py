# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Brings the rows of a batch from host memory to the devices of a mesh.

ids of the batch --stream_ids, unique--> ids --HostTables.read--> rows --put--> SomeRows

Of several processes each has the ids of the whole batch, so all have the same unique ones.
"""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from jtok_jax.config import Config
from jtok_jax.mesh import put_batch, put_whole
from jtok_jax.model.ngram_index import indices_of, names_of, ngrams_of
from jtok_jax.model.params import Params, declared_tables
from jtok_jax.model.tables import SomeRows, stream_ids
from jtok_jax.store.tables import HostTables

Ids = dict[str, np.ndarray]  # by stream; int32, ascending, each once
FEW = 64  # times fewer ids than a stream has rows are sorted; of more it is marked which there are


class RowReader:
    """Reads rows of one store. Of threads one at a time may use it."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        store: HostTables,
        put: Callable[[Mesh, np.ndarray], jax.Array] = put_batch,
        *,
        params: Params | None = None,
    ):
        """put: how arrays of a batch lie on `mesh`. params: see `find_ngrams_with`."""
        self._mesh, self._store, self._put = mesh, store, put
        self._streams_layers = config.mesh.table_streaming
        self._makes_ngrams = config.model.arms.makes_ngrams
        streams = {table.stream for table in declared_tables(config.model).values()}
        self.streams = {name: config.model.id_streams[name] for name in sorted(streams)}
        self.find_ngrams_with(params or {})

    def find_ngrams_with(self, params: Params) -> None:
        """Take from a model's parameters what frequent n-grams are found with."""
        self._ngrams = {
            name: ngrams_of(jax.tree.map(np.asarray, one), self.streams[name])
            for name, one in indices_of(params).items()
            if name in self.streams
        }

    def without_indices(self, params: Params) -> Params:
        """Return parameters with empty indices, if they are here and no device needs them."""
        mine = () if self._makes_ngrams else self._ngrams
        return params | {one: np.empty(0, np.int32) for name in mine for one in names_of(name)}

    def fetch(self, ids_BT: np.ndarray, before_BC: np.ndarray | None = None) -> SomeRows:
        """Return the rows of a batch that changes none, without their ids.

        For one device they are arrays of NumPy: a compiled function takes those in less time than
        they could be put there. Those that are streamed are put. `before_BC` is that of
        `stream_ids`.
        """
        places, ids = self.unique(ids_BT, before_BC)
        room = {
            name: min(stream.num_rows, ids_BT.size * stream.heads + stream.frequent)
            for name, stream in self.streams.items()
        }
        leaves = self._store.read(ids, room)
        if self._mesh.size > 1 or self._streams_layers:
            places = {name: self._put(self._mesh, one) for name, one in places.items()}
            leaves = self._store.put(leaves)
        return SomeRows(places, {}, leaves)

    def unique(self, ids_BT: np.ndarray, before_BC: np.ndarray | None = None) -> tuple[Ids, Ids]:
        """Return for each stream the place of every id among the unique ones, and these."""
        places, unique = {}, {}
        for name, stream in self.streams.items():
            if stream.frequent:
                ids = self._ngrams[name].match(ids_BT, before_BC).rows + 1
            else:
                ids = stream_ids(stream, ids_BT, before_BC, xp=np)
            unique[name], places[name] = _unique(ids, stream.num_rows)
            if stream.frequent and unique[name][0]:  # the row of none is there, read or not
                unique[name] = np.append(np.int32(0), unique[name])
                places[name] += 1
        return places, unique

    def put(self, places: Ids, ids: Ids, room: Mapping[str, int]) -> SomeRows:
        """Return rows of `unique` ids on the devices, with room for so many of each stream."""
        padded = {
            name: np.pad(
                ids[name], (0, room[name] - len(ids[name])), constant_values=stream.num_rows
            )
            for name, stream in self.streams.items()
        }
        return SomeRows(
            places={name: self._put(self._mesh, one) for name, one in places.items()},
            ids={name: put_whole(self._mesh, one) for name, one in padded.items()},
            leaves=self._store.put(self._store.read(ids, room)),
        )


def _unique(ids: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids below `rows` that there are, int32, and the place of each among them."""
    if ids.size * FEW < rows:
        unique, places = np.unique(ids, return_inverse=True)
        return unique.astype(np.int32), places.reshape(ids.shape).astype(np.int32)
    used = np.zeros(rows, bool)  # a sort of many would take thirty times as long
    used[ids] = True
    unique = np.flatnonzero(used).astype(np.int32)
    place = np.empty(rows, np.int32)
    place[unique] = np.arange(len(unique), dtype=np.int32)
    return unique, place[ids]
