# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Tables in host memory: rows, and what their optimizer keeps of them, as NumPy arrays.

leaf of a stack   [G, (M,) R (, D)]   as checkpoints and devices have it
leaf of the store [R, G, (M,) (D)]    one id is one run of memory over layers and tables
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jtok_kernels import RowOptimizer

from jtok_jax.model.params import Declared, declared_tables, init_rows, initial_options
from jtok_jax.model.tables import ROWS
from jtok_jax.model_config import ModelConfig

Leaves = dict[str, dict[str, np.ndarray]]  # by table and leaf
CHUNK = 32 << 20  # bytes of rows that are drawn at once


class HostTables:
    """All tables of a model by rows. Of threads one at a time may use them.

    broken: tables that took a row which is not finite.
    """

    def __init__(self, model: ModelConfig, optimizers: Mapping[str, RowOptimizer]):
        """Allocate, without a value; `optimizers` by table, {} where nothing is trained."""
        self.broken: set[str] = set()
        self._model, self._tables = model, declared_tables(model)
        self.leaves: Leaves = {}  # by rows
        for name, table in self._tables.items():
            whole = jax.ShapeDtypeStruct(table.shape, table.dtype)
            found = {ROWS: whole}
            if name in optimizers:
                found |= jax.eval_shape(optimizers[name].init, whole)
            self.leaves[name] = {
                leaf: np.empty(_by_rows(one.shape, table), one.dtype)
                for leaf, one in found.items()
                if one.ndim  # scalars are the state's
            }

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for leaves in self.leaves.values() for x in leaves.values())

    def initialise(self, key: jax.Array) -> None:
        """Draw the rows that `init_params` would draw, some at a time; states are zero."""
        for leaves in self.leaves.values():
            for leaf, value in leaves.items():
                if leaf != ROWS:
                    value[...] = 0
        draw = jax.jit(init_rows, static_argnums=0, compiler_options=initial_options())
        rows = {table.stream: table.shape[-2] for table in self._tables.values()}
        step = max(1, CHUNK // max(1, sum(x[ROWS][0].nbytes for x in self.leaves.values())))
        for first in range(0, max(rows.values()), step):
            # Ids beyond a table's rows are drawn as zeros, and left out.
            ids = jnp.arange(first, first + step, dtype=jnp.int32)
            drawn = draw(self._model, key, dict.fromkeys(rows, ids))
            for name, value in drawn.items():
                into = self.leaves[name][ROWS][first : first + step]
                into[...] = np.moveaxis(np.asarray(value), -2, 0)[: len(into)]

    def read(self, ids: Mapping[str, np.ndarray]) -> Leaves:
        """Return the rows of int32 ids [U] by stream; those beyond a table stand for nothing."""
        return {
            name: {leaf: _take(x, ids[self._tables[name].stream]) for leaf, x in leaves.items()}
            for name, leaves in self.leaves.items()
        }

    def write(self, ids: Mapping[str, np.ndarray], rows: Mapping[str, Mapping]) -> None:
        """Take the first len(ids) of `rows` as the rows of `ids`, each once and in the tables."""
        for name, leaves in self.leaves.items():
            of_table = ids[self._tables[name].stream]
            for leaf, value in leaves.items():
                new = np.asarray(rows[name][leaf])[: len(of_table)]
                if leaf == ROWS and not np.isfinite(new).all():
                    self.broken.add(name)
                _words(value)[of_table] = _words(new)

    def by_name(self) -> dict[str, np.ndarray]:
        """Return every leaf by its name in a checkpoint, with the axes it has there: a view."""
        found = {}
        for table, leaves in self.leaves.items():
            axis = len(self._tables[table].shape) - 2
            for leaf, value in leaves.items():
                name = f"params/{table}" if leaf == ROWS else f"opt_state/{table}/{leaf}"
                found[name] = np.moveaxis(value, 0, axis)
        return found


def _by_rows(shape: tuple[int, ...], table: Declared) -> tuple[int, ...]:
    axis = len(table.shape) - 2
    return shape[axis], *shape[:axis], *shape[axis + 1 :]


def _take(array: np.ndarray, ids: np.ndarray) -> np.ndarray:
    out = np.empty((len(ids), *array.shape[1:]), array.dtype)
    # "clip" writes into `out`; the default copies once more, to leave it whole where an id is bad.
    np.take(_words(array), ids, axis=0, out=_words(out), mode="clip")
    return out


def _words(array: np.ndarray) -> np.ndarray:
    """Return bfloat16 as words, which NumPy copies faster than a type of another library."""
    return array.view(np.uint16) if array.dtype == jnp.bfloat16 else array
