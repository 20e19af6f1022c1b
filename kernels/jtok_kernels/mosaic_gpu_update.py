# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""`update_rows` as one Mosaic kernel for all rows of all tables of a stack, in place.

A block takes `ROWS` gradients in turn. Where one is not zero it reads the row and its state into
registers, calls the optimizer's own `update` and writes them back. So the places of a plan that
hold no id cost nothing. A table that no token of an id chose costs the reading of a zero gradient.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jtok_kernels.mosaic_gpu import MosaicGpu
from jtok_kernels.rounding import round_at_random, row_seeds
from jtok_kernels.row_optimizers import RowGrads, Scalars

ROWS = 16  # of a block: enough to hide its start, few enough that uneven blocks even out


def update_kernel(gpu: MosaicGpu, optimizer, table, arrays, of: RowGrads, scalars: Scalars, seed):
    """Return (table, arrays) after the step; see update.update_rows."""
    num_rows, dim = table.shape[-2:]
    num_unique, names = of.unique_U.size, list(arrays)
    count = of.grads.size // dim
    grads = of.grads.reshape(-1, num_unique, dim)
    at_random = table.dtype == jnp.bfloat16 and seed is not None
    ids_U = of.unique_U if of.rounding_ids_U is None else of.rounding_ids_U

    def body(unique, ids, grads, integers, floats, words, table, *state):
        load = gpu.loader(table, grads)
        step, num_grads = integers[0], integers[1]
        scalars = Scalars(step, floats[0], floats[1])
        first = ROWS * lax.axis_index("n")

        def place(i, carry):
            number, u = lax.div(i, num_unique), lax.rem(i, num_unique)
            row = unique[u]

            @pl.when(row < num_rows)
            def _row():
                g = load(grads.at[number, u])

                @pl.when(jnp.sum(jnp.abs(g)) != 0.0)  # also where it is not finite
                def _touched():
                    wide = lambda ref: len(ref.shape) == 3
                    read = lambda ref: load(ref.at[number, row]) if wide(ref) else ref[number, row]
                    old = dict(zip(names, map(read, state), strict=True))
                    new_row, new = optimizer.update(read(table), old, floats[2] * g, scalars)
                    if at_random:
                        row_seed = row_seeds(words, number, ids[u])
                        new_row = round_at_random(new_row, row_seed, gpu.iota(table, grads))
                    table[number, row] = new_row.astype(table.dtype)
                    for name, ref in zip(names, state, strict=True):
                        ref[number, row] = new[name].astype(ref.dtype)

            return carry

        lax.fori_loop(first, jnp.minimum(first + ROWS, num_grads), place, 0)

    integers = jnp.stack([scalars.step, jnp.where(of.apply, count, 0)]).astype(jnp.int32)
    floats = jnp.stack([scalars.learning_rate, scalars.log_decay, of.grad_scale]).astype(
        jnp.float32
    )
    words = jnp.zeros(2, jnp.uint32) if seed is None else seed
    values = [table, *arrays.values()]
    flat = lambda x: x.reshape(-1, *x.shape[table.ndim - 2 :])
    refs = [jax.new_ref(flat(value)) for value in values]
    run = gpu.kernel(body, (), grid=pl.cdiv(count, ROWS), axis="n", barriers=True)
    run(of.unique_U, ids_U, grads, integers, floats, words, *refs)
    new = [jax.freeze(ref).reshape(value.shape) for ref, value in zip(refs, values, strict=True)]
    return new[0], dict(zip(names, new[1:], strict=True))
