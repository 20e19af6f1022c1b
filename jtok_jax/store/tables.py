# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Tables in host memory: rows, and what their optimizer keeps of them, as NumPy arrays by rows.

A row has its first value from the seed, the table and its id. In memory all are drawn at once. In
files each is drawn when it is read, until it is written: so they take the room of rows in use.

Of several processes each has its part of every row, see part.py; "whole" is said of all parts.
"""

import contextlib
import math
import pathlib
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jtok_jax.config import Config
from jtok_jax.errors import ConfigError
from jtok_jax.model.params import declared_tables, init_rows, initial_options
from jtok_jax.model.tables import ROWS
from jtok_jax.store.mapped import Contents, MappedFolder
from jtok_jax.store.part import Part, Region, of_all_processes
from jtok_jax.store.pieces import Pieces
from jtok_jax.store.rows import (
    Optimizers,
    in_int8,
    saved_name,
    shape_by_rows,
    step_shardings,
    whole_leaves,
    words,
)

Arrays = dict[str, dict[str, np.ndarray]]  # by table and leaf
CHUNK = 32 << 20  # bytes of rows that are drawn, or looked at, at once
AT_ONCE = 64  # rows that are read and moved at once
FEW = 128  # rows that are drawn at once of those which a step reads for the first time


class HostTables:
    """All tables of a model by rows. Of threads one at a time may use them.

    whole: shapes of the leaves, see `whole_leaves`. saved_shapes: those of a checkpoint, by name.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        optimizers: Optimizers,
        *,
        contents: Contents | None = None,
        saved_in_int8: bool = False,
    ):
        """Allocate, without a value: in memory, or sparse files in mesh.table_folder.

        Args:
            mesh: whose devices of this process say what it holds.
            optimizers: by table, {} where nothing is trained.
            contents: of mesh.table_folder, whose files are used if they hold them.
            saved_in_int8: the checkpoint has rows in int8 already.

        Raises:
            ConfigError: this machine has less memory left; see also `Part`.
            CheckpointError, WorkdirError: see `MappedFolder`.
        """
        int8 = config.mesh.table_dtype == "int8"
        self._int8, self._narrows, self._broken = int8, int8 and not saved_in_int8, set()
        self._is_trained = bool(optimizers)
        self.whole = whole_leaves(config.model, optimizers, int8=self._int8)
        self._model, self._tables = config.model, declared_tables(config.model)
        saved = whole_leaves(config.model, optimizers, int8=saved_in_int8)
        self._leaf_of = {
            saved_name(table, leaf): (table, leaf)
            for table, leaves in saved.items()
            for leaf in leaves
        }
        self.saved_shapes = {
            name: saved[table][leaf] for name, (table, leaf) in self._leaf_of.items()
        }
        self._seed, path = config.train.seed, config.mesh.table_folder
        self._parts: dict[str, dict[str, Part]] = {}
        shapes, shardings = {}, step_shardings(config, mesh, self.whole)
        for name, leaves in self.whole.items():
            self._parts[name] = {}
            for leaf, x in leaves.items():
                count, *row = shape_by_rows(x, self._axis(name))
                part = Part(row, shardings[name][leaf], axis=self._axis(name))
                self._parts[name][leaf] = part
                shapes[f"{name}.{leaf}"] = jax.ShapeDtypeStruct((count, *part.shape), x.dtype)
        for name in {table.stream for table in self._tables.values()}:
            rows = config.model.id_streams[name].num_rows
            shapes[f"drawn.{name}"] = jax.ShapeDtypeStruct((rows,), bool)
        self._folder = self._open(pathlib.Path(path), shapes, contents) if path else None
        if not path:
            _require_memory(sum(x.size * x.dtype.itemsize for x in shapes.values()))
        self._hold(
            self._folder.arrays
            if self._folder
            else {name: np.empty(x.shape, x.dtype) for name, x in shapes.items()}
        )

    def _open(self, path: pathlib.Path, shapes: dict, contents: Contents) -> MappedFolder:
        """Open the files of this process, in a folder of its own where there are several.

        In training they are made anew; tools use what is there, if it is this part.
        """
        if jax.process_count() > 1:
            path /= f"process-{jax.process_index()}-of-{jax.process_count()}"
            if not self._is_trained:
                parts = str({name: of[ROWS].local_regions for name, of in self._parts.items()})
                contents = Contents(
                    f"{contents.description}, of every row {parts}",
                    contents.identity | {"parts": parts},
                )
        return MappedFolder(path, shapes, contents)

    @property
    def shardings(self) -> dict[str, dict[str, NamedSharding]]:
        """Return how `put` lays rows on the devices, by table and leaf."""
        return {
            name: {leaf: part.sharding for leaf, part in leaves.items()}
            for name, leaves in self._parts.items()
        }

    @property
    def is_published(self) -> bool:
        """Return whether the files hold the checkpoint asked for; they are only read."""
        return bool(self._folder) and self._folder.is_published

    def all_published(self) -> bool:
        """Return whether the files of all processes are; all call this."""
        return bool(of_all_processes(np.array(self.is_published)).all())

    @property
    def is_sparse(self) -> bool:
        """Return whether rows are left out: zeros, where a row was never written."""
        return not all(drawn.all() for drawn in self._drawn.values())

    def initialise(self) -> None:
        """Give every row the value that `init_params` would draw; states are zero."""
        for leaves in self._arrays.values():
            for leaf, value in leaves.items():
                if not self._folder and leaf != ROWS:
                    value[...] = 0
        for drawn in self._drawn.values():
            drawn[...] = False
        if not self._folder:
            self.complete()

    @contextlib.contextmanager
    def read_ahead(self) -> Iterator[None]:
        """While this lasts, read and write whole tables: files are then read ahead."""
        with self._folder.read_ahead() if self._folder else contextlib.nullcontext():
            yield

    def regions(self, name: str) -> dict[Region, bool]:
        """Return the regions of a leaf of `saved_shapes`, and whether this process reads each."""
        table, leaf = self._leaf_of[name]
        if self._narrows:  # the scale of a row is that of all its columns
            return {tuple((0, size) for size in self.saved_shapes[name].shape): True}
        part = self._parts[table][leaf]
        local = part.local_regions
        return {self._stacked(name, region): region in local for region in part.holders}

    def _stacked(self, name: str, region: Region) -> Region:
        """Return a region of rows as one of a stacked leaf."""
        axis = self._axis(self._leaf_of[name][0])
        return (*region[:axis], (0, self.saved_shapes[name].shape[axis]), *region[axis:])

    def fill(self, name: str, start: tuple[int, ...], piece: np.ndarray) -> None:
        """Take what this process holds of a piece of a leaf of `saved_shapes`.

        What is there already is not written: holes in files stay holes.

        Args:
            start: where the piece begins in the leaf.
            piece: stacked; with all columns of rows that become int8.

        Raises WorkdirError: the disk of the files is full.
        """
        table, leaf = self._leaf_of[name]
        axis = self._axis(table)
        rows, begin, first = np.moveaxis(piece, axis, 0), [*start], start[axis]
        del begin[axis]
        narrows = self._narrows and leaf == ROWS
        for one, value in (in_int8(rows) if narrows else {leaf: rows}).items():
            at = begin[: value.ndim - 1]
            for here, there in self._parts[table][one].overlaps(at, value.shape[1:]):
                into = self._arrays[table][one][first : first + len(value), *here]
                mine, word = value[:, *there], np.dtype(f"u{value.itemsize}")
                differs = mine.view(word) != into.view(word)
                changed = differs.reshape(len(differs), -1).any(axis=1)
                self._reserve(table, one, first + np.flatnonzero(changed))
                np.copyto(into, mine, where=differs)

    def _axis(self, table: str) -> int:
        """Return the axis of rows in leaves of a table, stacked."""
        return len(self._tables[table].shape) - 2

    def finish_restore(self, *, sparse: bool) -> None:
        """Take what was filled as a checkpoint, which may be sparse."""
        for stream, drawn in self._drawn.items():
            drawn[...] = not sparse
            mine = [name for name, table in self._tables.items() if table.stream == stream]
            for name in mine if sparse else ():
                rows = self._arrays[name][ROWS]
                size = max(1, CHUNK // rows[0].nbytes)
                for first in range(0, len(rows), size):
                    part = words(rows[first : first + size])
                    drawn[first : first + size] |= part.reshape(len(part), -1).any(axis=1)
        if not self._folder:
            self.complete()

    def publish(self) -> None:
        """Keep the files as those of the checkpoint, for other processes to read."""
        self._folder.publish()
        self._hold(self._folder.arrays)

    def close(self) -> None:
        """Let other processes use the files; the tables must not be used any more."""
        if self._folder:
            self._arrays = self._drawn = {}
            self._folder.close()

    def read(self, ids: Mapping[str, np.ndarray], room: Mapping[str, int]) -> Arrays:
        """Return this process's rows of int32 ids [U] by stream, stacked; zeros up to the room.

        Raises CheckpointError: files were changed.
        """
        if self._folder:
            self._folder.check()
        found = {}
        for name, leaves in self._arrays.items():
            stream, axis = self._tables[name].stream, self._axis(name)
            found[name] = {
                leaf: _take(x, ids[stream], room[stream], axis) for leaf, x in leaves.items()
            }
        missing = {name: np.flatnonzero(~self._drawn[name][one]) for name, one in ids.items()}
        if any(map(len, missing.values())):
            wanted = {name: ids[name][places] for name, places in missing.items()}
            for name, first, rows in self._first_rows(wanted, FEW):
                places = missing[self._tables[name].stream][first : first + len(rows)]
                for leaf, value in self._stored(rows).items():
                    by_rows = np.moveaxis(found[name][leaf], self._axis(name), 0)
                    by_rows[places] = self._parts[name][leaf].local_rows(value)
        return found

    def put(self, rows: Arrays) -> dict[str, dict[str, jax.Array]]:
        """Return rows of `read` on the devices of all processes."""
        return {
            name: {leaf: self._parts[name][leaf].to_devices(x) for leaf, x in leaves.items()}
            for name, leaves in rows.items()
        }

    @jax.profiler.annotate_function
    def write(self, ids: Mapping[str, np.ndarray], rows: Mapping[str, Mapping]) -> None:
        """Take the first len(ids) of `rows` as the rows of `ids`, each once and in the tables.

        Args:
            rows: on the devices of all processes, waited for; by table and leaf.

        Raises WorkdirError: the disk of the files is full.
        """
        for name, leaves in self._arrays.items():
            of_table, axis = ids[self._tables[name].stream], self._axis(name)
            for leaf, value in leaves.items():
                self._reserve(name, leaf, of_table)
                new = self._parts[name][leaf].from_devices(rows[name][leaf])
                new = new[(slice(None),) * axis + (slice(len(of_table)),)]
                if leaf == ROWS and not np.isfinite(new).all():
                    self._broken.add(name)
                for place in np.ndindex(new.shape[:axis]):
                    words(value[:, *place])[of_table] = words(new[place])
        for stream, of_stream in ids.items():
            self._drawn[stream][of_stream] = True

    def non_finite(self) -> list[str]:
        """Return the tables that took a row which is not finite; all processes call this."""
        if not self.whole:
            return []
        own = np.array([name in self._broken for name in self.whole])
        found = of_all_processes(own).any(axis=0)
        return [name for name, is_broken in zip(self.whole, found, strict=True) if is_broken]

    def by_name(self) -> dict[str, Pieces]:
        """Return every leaf of `saved_shapes`: views."""
        found = {}
        for name, (table, leaf) in self._leaf_of.items():
            part, array = self._parts[table][leaf], self._arrays[table][leaf]
            regions, replicas, axis = {}, {}, self._axis(table)
            for region in part.holders:
                stacked = self._stacked(name, region)
                regions[stacked] = None
                if region in part.local_regions:
                    regions[stacked] = np.moveaxis(array[:, *part.local_slices(region)], 0, axis)
                    replicas[stacked] = part.replica(region)
            shape = self.saved_shapes[name]
            found[name] = Pieces(shape.shape, shape.dtype, regions, replicas=replicas, rows=axis)
        return found

    def _stored(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return the leaves that hold rows [n, G, (M,) D]."""
        return in_int8(rows) if self._int8 else {ROWS: rows}

    def _hold(self, arrays: Mapping[str, np.ndarray]) -> None:
        self._arrays: Arrays = {
            name: {leaf: arrays[f"{name}.{leaf}"] for leaf in leaves}
            for name, leaves in self.whole.items()
        }
        self._drawn = {
            name: arrays[f"drawn.{name}"]
            for name in {table.stream for table in self._tables.values()}
        }
        # Which rows have room on the disk, for all that is known.
        self._has_room = {
            name: {leaf: np.zeros(len(x), bool) for leaf, x in leaves.items()}
            for name, leaves in self._arrays.items()
        }

    def complete(self) -> None:
        """Draw and write all rows that were never written."""
        missing = {name: np.flatnonzero(~drawn) for name, drawn in self._drawn.items()}
        once = sum(self._bytes_of_row(name) for name in self.whole)
        for name, first, rows in self._first_rows(missing, max(1, CHUNK // max(1, once))):
            ids = missing[self._tables[name].stream][first : first + len(rows)]
            for leaf, value in self._stored(rows).items():
                self._reserve(name, leaf, ids)
                self._arrays[name][leaf][ids] = self._parts[name][leaf].local_rows(value)
        for drawn in self._drawn.values():
            drawn[...] = True

    def _bytes_of_row(self, table: str) -> int:
        """Return the bytes of one drawn row: whole, whatever this process keeps of it."""
        shape = self._tables[table].shape
        return math.prod(shape) // shape[-2] * np.dtype(self._tables[table].dtype).itemsize

    def _first_rows(
        self, ids: Mapping[str, np.ndarray], count: int
    ) -> Iterator[tuple[str, int, np.ndarray]]:
        """Yield (table, index of the first, rows) of ids by stream, `count` at a time."""
        draw = jax.jit(init_rows, static_argnums=0, compiler_options=initial_options())
        key = jax.random.key(self._seed)
        for first in range(0, max(map(len, ids.values()), default=0), count):
            part = {name: one[first : first + count] for name, one in ids.items()}
            padded = {}
            for name, one in part.items():  # beyond a table's rows are zeros
                beyond = len(self._drawn[name])
                padded[name] = np.full(count, beyond, np.int32)
                padded[name][: len(one)] = one
            for name, value in draw(self._model, key, padded).items():
                rows = np.moveaxis(np.asarray(value), -2, 0)
                yield name, first, rows[: len(part[self._tables[name].stream])]

    def _reserve(self, table: str, leaf: str, ids: np.ndarray) -> None:
        """Take room on the disk for ascending ids of a leaf, where files hold it."""
        if self._folder:
            room = self._has_room[table][leaf]
            new = ids[~room[ids]]
            self._folder.reserve(f"{table}.{leaf}", new)
            room[new] = True


def _require_memory(wanted: int) -> None:
    there = _memory_left()
    if there is not None and wanted > there:
        raise ConfigError(
            f"Tables in host memory take {wanted / 2**30:.1f} GiB with what their optimizer keeps, "
            f"and {there / 2**30:.1f} GiB are left here. Take rowwise_adagrad, which keeps one "
            "number a row, bfloat16 tables, fewer rows, or a machine with more memory."
        )


def _memory_left() -> int | None:
    """Return bytes that Linux would give to a process; None elsewhere."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * found[0] if found else None


def _take(array: np.ndarray, ids: np.ndarray, room: int, axis: int) -> np.ndarray:
    """Return rows of `array`, [R, G, ...], stacked: their axis is `axis`, as long as `room`."""
    shape = *array.shape[1 : axis + 1], room, *array.shape[axis + 1 :]
    out = np.zeros(shape, array.dtype)  # pages that are not written cost nothing
    by_rows, source = np.moveaxis(words(out), axis, 0), words(array)
    for first in range(0, len(ids), AT_ONCE):  # so few are still in a cache when they are moved
        some = ids[first : first + AT_ONCE]
        by_rows[first : first + len(some)] = source[some]
    return out
