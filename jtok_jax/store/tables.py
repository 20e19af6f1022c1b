# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Tables in host memory: rows, and what their optimizer keeps of them, as NumPy arrays by rows.

A row has its first value from the seed, the table and its id. In memory all are drawn at once. In
files each is drawn when it is read, until it is written: so they take the room of rows in use.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from jtok_jax.config import Config
from jtok_jax.errors import ConfigError
from jtok_jax.model.params import declared_tables, init_rows, initial_options
from jtok_jax.model.tables import ROWS
from jtok_jax.store.mapped import Contents, MappedFolder
from jtok_jax.store.rows import SCALE, Leaves, Optimizers, bytes_of, whole_leaves, words

Arrays = dict[str, dict[str, np.ndarray]]  # by table and leaf
CHUNK = 32 << 20  # bytes of rows that are drawn, or looked at, at once
FEW = 128  # rows that are drawn at once of those which a step reads for the first time


class HostTables:
    """All tables of a model by rows. Of threads one at a time may use them.

    whole: shapes of the leaves, see `whole_leaves`. saved_shapes: those of a checkpoint, by name.
    broken: tables that took a row which is not finite.
    """

    def __init__(self, config: Config, optimizers: Optimizers, *, contents: Contents | None = None):
        """Allocate, without a value: in memory, or sparse files in mesh.table_folder.

        Args:
            optimizers: by table, {} where nothing is trained.
            contents: of mesh.table_folder, whose files are used if they hold them.

        Raises:
            ConfigError: this machine has less memory left.
            CheckpointError, WorkdirError: see `MappedFolder`.
        """
        self._int8, self.broken = config.mesh.table_dtype == "int8", set()
        self.whole = whole_leaves(config.model, optimizers, int8=self._int8)
        self._model, self._tables = config.model, declared_tables(config.model)
        saved = whole_leaves(config.model, optimizers)
        self._leaf_of = {  # by name in a checkpoint
            f"params/{table}" if leaf == ROWS else f"opt_state/{table}/{leaf}": (table, leaf)
            for table, leaves in saved.items()
            for leaf in leaves
        }
        self.saved_shapes = {
            name: saved[table][leaf] for name, (table, leaf) in self._leaf_of.items()
        }
        self._seed, path = config.train.seed, config.mesh.table_folder
        shapes = {
            f"{name}.{leaf}": _by_rows(x, leaves[ROWS].ndim - 2)
            for name, leaves in self.whole.items()
            for leaf, x in leaves.items()
        }
        for name in {table.stream for table in self._tables.values()}:
            rows = config.model.id_streams[name].num_rows
            shapes[f"drawn.{name}"] = jax.ShapeDtypeStruct((rows,), bool)
        self._folder = MappedFolder(pathlib.Path(path), shapes, contents) if path else None
        if not path:
            _require_memory(self.whole)
        self._take(
            self._folder.arrays
            if self._folder
            else {name: np.empty(x.shape, x.dtype) for name, x in shapes.items()}
        )

    @property
    def is_published(self) -> bool:
        """Return whether the files hold the checkpoint asked for; they are only read."""
        return bool(self._folder) and self._folder.is_published

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

    def fill(self, name: str, start: tuple[int, ...], piece: np.ndarray) -> None:
        """Take a piece of a leaf of `saved_shapes`, with all columns of its rows.

        What is there already is not written: holes in files stay holes.

        Args:
            start: where the piece begins in the leaf.

        Raises WorkdirError: the disk of the files is full.
        """
        table, leaf = self._leaf_of[name]
        axis = self._axis(table)
        region = [slice(x, x + size) for x, size in zip(start, piece.shape, strict=True)]
        region.insert(0, region.pop(axis))
        rows = np.moveaxis(piece, axis, 0)
        for one, value in (self._stored(rows) if leaf == ROWS else {leaf: rows}).items():
            into = self._arrays[table][one][tuple(region[: value.ndim])]
            word = np.dtype(f"u{value.itemsize}")
            differs = value.view(word) != into.view(word)
            changed = differs.reshape(len(differs), -1).any(axis=1)
            self._reserve(table, one, start[axis] + np.flatnonzero(changed))
            np.copyto(into, value, where=differs)

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
        self._take(self._folder.arrays)

    def close(self) -> None:
        """Let other processes use the files; the tables must not be used any more."""
        if self._folder:
            self._arrays = self._drawn = {}
            self._folder.close()

    def read(self, ids: Mapping[str, np.ndarray], room: Mapping[str, int]) -> Arrays:
        """Return the rows of int32 ids [U] by stream, and zeros up to the room of each.

        Raises CheckpointError: files were changed.
        """
        if self._folder:
            self._folder.check()
        found = {}
        for name, leaves in self._arrays.items():
            stream = self._tables[name].stream
            found[name] = {leaf: _take(x, ids[stream], room[stream]) for leaf, x in leaves.items()}
        missing = {name: np.flatnonzero(~self._drawn[name][one]) for name, one in ids.items()}
        if any(map(len, missing.values())):
            wanted = {name: ids[name][places] for name, places in missing.items()}
            for name, first, rows in self._first_rows(wanted, FEW):
                places = missing[self._tables[name].stream][first : first + len(rows)]
                for leaf, value in self._stored(rows).items():
                    found[name][leaf][places] = value
        return found

    @jax.profiler.annotate_function
    def write(self, ids: Mapping[str, np.ndarray], rows: Mapping[str, Mapping]) -> None:
        """Take the first len(ids) of `rows` as the rows of `ids`, each once and in the tables.

        Raises WorkdirError: the disk of the files is full.
        """
        for name, leaves in self._arrays.items():
            of_table = ids[self._tables[name].stream]
            for leaf, value in leaves.items():
                self._reserve(name, leaf, of_table)
                new = np.asarray(rows[name][leaf])[: len(of_table)]
                if leaf == ROWS and not np.isfinite(new).all():
                    self.broken.add(name)
                words(value)[of_table] = words(new)
        for stream, of_stream in ids.items():
            self._drawn[stream][of_stream] = True

    def by_name(self) -> dict[str, np.ndarray]:
        """Return every leaf of `saved_shapes`: a view."""
        views = {}
        for name, (table, leaf) in self._leaf_of.items():
            views[name] = np.moveaxis(self._arrays[table][leaf], 0, self._axis(table))
        return views

    def _stored(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Return the leaves that hold rows [n, G, (M,) D], in int8 to the nearest."""
        if not self._int8:
            return {ROWS: rows}
        rows = np.asarray(rows, np.float32)
        scale = np.abs(rows).max(axis=-1) / 127
        steps = rows / np.where(scale > 0, scale, 1)[..., None]
        return {ROWS: np.rint(steps).astype(np.int8), SCALE: scale}

    def _take(self, arrays: Mapping[str, np.ndarray]) -> None:
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
        once = sum(leaves[ROWS][0].nbytes for leaves in self._arrays.values())
        for name, first, rows in self._first_rows(missing, max(1, CHUNK // max(1, once))):
            ids = missing[self._tables[name].stream][first : first + len(rows)]
            for leaf, value in self._stored(rows).items():
                self._reserve(name, leaf, ids)
                self._arrays[name][leaf][ids] = value
        for drawn in self._drawn.values():
            drawn[...] = True

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


def _require_memory(leaves: Leaves) -> None:
    wanted, there = bytes_of(leaves), _memory_left()
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


def _by_rows(stacked: jax.ShapeDtypeStruct, axis: int) -> jax.ShapeDtypeStruct:
    shape = stacked.shape
    return jax.ShapeDtypeStruct((shape[axis], *shape[:axis], *shape[axis + 1 :]), stacked.dtype)


def _take(array: np.ndarray, ids: np.ndarray, room: int) -> np.ndarray:
    out = np.zeros((room, *array.shape[1:]), array.dtype)  # pages that are not written cost nothing
    # "clip" writes into `out`; the default copies once more, to leave it whole where an id is bad.
    np.take(words(array), ids, axis=0, out=words(out[: len(ids)]), mode="clip")
    return out
