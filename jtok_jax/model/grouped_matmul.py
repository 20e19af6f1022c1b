# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Matmul of sorted row groups, each with its own matrix; work and memory do not grow with groups.

On TPU `jax.lax.ragged_dot` is a kernel. On CPU and GPU it expands to [groups, rows, features], so
there the rows are cut into blocks that belong to one group each. A CPU walks them one by one, which
on a GPU would be hundreds of steps that each wait for the host: there blocks are rows of their
own, many of them are one batched matmul, and their number is an upper bound known beforehand.

Axes: R rows sorted by group, E groups, D contracted, F output features, N blocks of S rows.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

AT_ONCE = 1 << 27  # bytes of the float32 matrices of the blocks that a GPU computes at once


@jax.custom_vjp
def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Return y [R, F] with y_r = x_r @ w[group of r].

    Args:
        sizes_E: int32, rows of each group in order. Rows past their sum give something finite
            that must not count.
    """
    return jax.lax.platform_dependent(
        x_RD, w_EDF, sizes_E,
        tpu=_forward_ragged, cuda=_forward_batched, default=_forward_blocks,
    )  # fmt: skip


def _forward(x_RD, w_EDF, sizes_E):
    return grouped_matmul(x_RD, w_EDF, sizes_E), (x_RD, w_EDF, sizes_E)


def _backward(residuals, dy_RF):
    dx_RD, dw_EDF = jax.lax.platform_dependent(
        *residuals, dy_RF,
        tpu=_backward_ragged, cuda=_backward_batched, default=_backward_blocks,
    )  # fmt: skip
    return dx_RD, dw_EDF, None


grouped_matmul.defvjp(_forward, _backward)


def _forward_ragged(x_RD, w_EDF, sizes_E):
    return _in_groups(jax.lax.ragged_dot(x_RD, w_EDF, sizes_E), sizes_E)


def _backward_ragged(x_RD, w_EDF, sizes_E, dy_RF):
    _, pull = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, sizes_E), x_RD, w_EDF)
    dx_RD, dw_EDF = pull(dy_RF)
    return _in_groups(dx_RD, sizes_E), dw_EDF


def _in_groups(y_RX, sizes_E):
    """Return `y` with zeros past the last group, where the kernel of TPUs writes nothing."""
    return jnp.where(jnp.arange(len(y_RX))[:, None] < sizes_E.sum(), y_RX, 0)


def block_rows(num_rows: int, num_groups: int) -> int:
    """Return rows of a block: a power of two, about an eighth of its rows wasted on average."""
    return min(512, max(16, 1 << max(0, (num_rows // (4 * num_groups)).bit_length() - 1)))


def _forward_blocks(x_RD, w_EDF, sizes_E):
    num_rows, block = x_RD.shape[0], block_rows(x_RD.shape[0], w_EDF.shape[0])
    padded_x = jnp.pad(x_RD, ((0, block), (0, 0)))
    y = jnp.zeros((num_rows + block, w_EDF.shape[2]), x_RD.dtype)

    def step(y, group, start, _):
        rows = jax.lax.dynamic_slice_in_dim(padded_x, start, block)
        # Rows past the end of the group are overwritten by the blocks of the next ones.
        return jax.lax.dynamic_update_slice_in_dim(y, rows @ w_EDF[group], start, axis=0)

    return _over_blocks(step, y, sizes_E, block)[:num_rows]


def _backward_blocks(x_RD, w_EDF, sizes_E, dy_RF):
    num_rows, block = x_RD.shape[0], block_rows(x_RD.shape[0], w_EDF.shape[0])
    padded_x = jnp.pad(x_RD, ((0, block), (0, 0)))
    padded_dy = jnp.pad(dy_RF, ((0, block), (0, 0)))

    def step(gradients, group, start, count):
        dx, dw = gradients
        rows = jax.lax.dynamic_slice_in_dim(padded_x, start, block)
        dy = jax.lax.dynamic_slice_in_dim(padded_dy, start, block)
        dx = jax.lax.dynamic_update_slice_in_dim(dx, dy @ w_EDF[group].T, start, axis=0)
        own = jnp.where(jnp.arange(block)[:, None] < count, rows, 0)
        update = jnp.einsum("RD,RF->DF", own, dy, preferred_element_type=jnp.float32)
        return dx, dw.at[group].add(update)

    start = jnp.zeros_like(padded_x), jnp.zeros(w_EDF.shape, jnp.float32)
    dx, dw = _over_blocks(step, start, sizes_E, block)
    return dx[:num_rows], dw.astype(w_EDF.dtype)


def _over_blocks(step: Callable, carry, sizes_E: jax.Array, block: int):
    """Fold `step(carry, group, first row, rows in the block)` over the blocks in row order."""
    ends_E = jnp.cumsum(sizes_E)
    block_ends_E = jnp.cumsum(-(-sizes_E // block))

    def body(index, carry):
        group = jnp.searchsorted(block_ends_E, index, side="right")
        blocks_before = block_ends_E[group] - -(-sizes_E[group] // block)
        start = ends_E[group] - sizes_E[group] + (index - blocks_before) * block
        return step(carry, group, start, ends_E[group] - start)

    return jax.lax.fori_loop(0, block_ends_E[-1], body, carry)


# ------------------------------------------------------------------------ many blocks at once


def _parts(num_rows: int, w_EDF: jax.Array, sizes_E: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return rows of every block and its group, int32 [parts, n, S] and [parts, n].

    Places without row have numbers from R on, no two the same.
    """
    size = block_rows(num_rows, sizes_E.size)
    count = num_rows // size + sizes_E.size  # of all groups at most, each rounded up
    parts = -(-count // max(1, AT_ONCE // (4 * math.prod(w_EDF.shape[1:]))))
    at_once = -(-count // parts)
    ends_E, blocks_E = jnp.cumsum(sizes_E), -(-sizes_E // size)
    block_ends_E, numbers_N = jnp.cumsum(blocks_E), jnp.arange(parts * at_once)
    group_N = jnp.searchsorted(block_ends_E, numbers_N, side="right", method="compare_all")
    group_N = group_N.clip(0, sizes_E.size - 1)  # blocks past the last have no rows
    number_N = numbers_N - (block_ends_E - blocks_E)[group_N]
    first_N = (ends_E - sizes_E)[group_N] + number_N * size
    rows_NS = first_N[:, None] + jnp.arange(size)
    nowhere_NS = num_rows + jnp.arange(rows_NS.size).reshape(rows_NS.shape)
    rows_NS = jnp.where(rows_NS < ends_E[group_N][:, None], rows_NS, nowhere_NS)
    return rows_NS.reshape(parts, at_once, size), group_N.reshape(parts, at_once)


def _read(array_RX: jax.Array, rows_nS: jax.Array) -> jax.Array:
    """Return [n, S, X], zeros where there is no row."""
    return array_RX.at[rows_nS].get(mode="fill", fill_value=0)


def _written(array_RX: jax.Array, rows_nS: jax.Array, values_nSX: jax.Array) -> jax.Array:
    return array_RX.at[rows_nS].set(values_nSX, mode="drop", unique_indices=True)


def _forward_batched(x_RD, w_EDF, sizes_E):
    def part(y_RF, blocks):
        rows_nS, group_n = blocks
        y_nSF = jnp.einsum("nSD,nDF->nSF", _read(x_RD, rows_nS), w_EDF[group_n])
        return _written(y_RF, rows_nS, y_nSF), None

    y_RF = jnp.zeros((len(x_RD), w_EDF.shape[2]), x_RD.dtype)
    return jax.lax.scan(part, y_RF, _parts(len(x_RD), w_EDF, sizes_E))[0]


def _backward_batched(x_RD, w_EDF, sizes_E, dy_RF):
    """Return the gradients; the sums over a group's blocks are in no order unless XLA is told."""

    def part(gradients, blocks):
        (dx_RD, dw_EDF), (rows_nS, group_n) = gradients, blocks
        x_nSD, dy_nSF = _read(x_RD, rows_nS), _read(dy_RF, rows_nS)
        dx_nSD = jnp.einsum("nSF,nDF->nSD", dy_nSF, w_EDF[group_n])
        dw_nDF = jnp.einsum("nSD,nSF->nDF", x_nSD, dy_nSF, preferred_element_type=jnp.float32)
        return (_written(dx_RD, rows_nS, dx_nSD), dw_EDF.at[group_n].add(dw_nDF)), None

    zeros = jnp.zeros_like(x_RD), jnp.zeros(w_EDF.shape, jnp.float32)
    (dx_RD, dw_EDF), _ = jax.lax.scan(part, zeros, _parts(len(x_RD), w_EDF, sizes_E))
    return dx_RD, dw_EDF.astype(w_EDF.dtype)
