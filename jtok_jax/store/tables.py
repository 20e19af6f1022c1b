# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Tables in host memory: rows, and what their optimizer keeps of them, as NumPy arrays by rows."""

import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jtok_jax.errors import ConfigError
from jtok_jax.model.params import declared_tables, init_rows, initial_options
from jtok_jax.model.tables import ROWS
from jtok_jax.model_config import ModelConfig
from jtok_jax.store.rows import Leaves, Optimizers, bytes_of, whole_leaves

Arrays = dict[str, dict[str, np.ndarray]]  # by table and leaf
CHUNK = 32 << 20  # bytes of rows that are drawn at once


class HostTables:
    """All tables of a model by rows. Of threads one at a time may use them.

    whole: shapes of the leaves, see `whole_leaves`. broken: tables that took a row which is not
    finite.
    """

    def __init__(self, model: ModelConfig, optimizers: Optimizers):
        """Allocate, without a value; `optimizers` by table, {} where nothing is trained.

        Raises ConfigError: this machine has less memory left.
        """
        self.whole, self.broken = whole_leaves(model, optimizers), set()
        _require_memory(self.whole)
        self._model, self._tables = model, declared_tables(model)
        self._arrays: Arrays = {}
        for name, leaves in self.whole.items():
            axis = leaves[ROWS].ndim - 2
            shape = lambda x, axis=axis: (x.shape[axis], *x.shape[:axis], *x.shape[axis + 1 :])
            self._arrays[name] = {leaf: np.empty(shape(x), x.dtype) for leaf, x in leaves.items()}

    def initialise(self, key: jax.Array) -> None:
        """Draw the rows that `init_params` would draw, some at a time; states are zero."""
        for leaves in self._arrays.values():
            for leaf, value in leaves.items():
                if leaf != ROWS:
                    value[...] = 0
        draw = jax.jit(init_rows, static_argnums=0, compiler_options=initial_options())
        rows = {table.stream: table.shape[-2] for table in self._tables.values()}
        step = max(1, CHUNK // max(1, sum(x[ROWS][0].nbytes for x in self._arrays.values())))
        for first in range(0, max(rows.values()), step):
            # Ids beyond a table's rows are drawn as zeros, and left out.
            ids = jnp.arange(first, first + step, dtype=jnp.int32)
            drawn = draw(self._model, key, dict.fromkeys(rows, ids))
            for name, value in drawn.items():
                into = self._arrays[name][ROWS][first : first + step]
                into[...] = np.moveaxis(np.asarray(value), -2, 0)[: len(into)]

    def read(self, ids: Mapping[str, np.ndarray], room: Mapping[str, int]) -> Arrays:
        """Return the rows of int32 ids [U] by stream, and zeros up to the room of each."""
        found = {}
        for name, leaves in self._arrays.items():
            stream = self._tables[name].stream
            found[name] = {leaf: _take(x, ids[stream], room[stream]) for leaf, x in leaves.items()}
        return found

    def write(self, ids: Mapping[str, np.ndarray], rows: Mapping[str, Mapping]) -> None:
        """Take the first len(ids) of `rows` as the rows of `ids`, each once and in the tables."""
        for name, leaves in self._arrays.items():
            of_table = ids[self._tables[name].stream]
            for leaf, value in leaves.items():
                new = np.asarray(rows[name][leaf])[: len(of_table)]
                if leaf == ROWS and not np.isfinite(new).all():
                    self.broken.add(name)
                _words(value)[of_table] = _words(new)

    def by_name(self) -> dict[str, np.ndarray]:
        """Return every leaf by its name in a checkpoint, with the axes it has there: a view."""
        found = {}
        for table, leaves in self._arrays.items():
            axis = len(self._tables[table].shape) - 2
            for leaf, value in leaves.items():
                name = f"params/{table}" if leaf == ROWS else f"opt_state/{table}/{leaf}"
                found[name] = np.moveaxis(value, 0, axis)
        return found


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


def _take(array: np.ndarray, ids: np.ndarray, room: int) -> np.ndarray:
    out = np.zeros((room, *array.shape[1:]), array.dtype)  # pages that are not written cost nothing
    # "clip" writes into `out`; the default copies once more, to leave it whole where an id is bad.
    np.take(_words(array), ids, axis=0, out=_words(out[: len(ids)]), mode="clip")
    return out


def _words(array: np.ndarray) -> np.ndarray:
    """Return bfloat16 as words, which NumPy copies faster than a type of another library."""
    return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array
