# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Matmul of sorted row groups, each with its own matrix; work and memory do not grow with groups.

On TPU `jax.lax.ragged_dot` is a kernel. On CPU and GPU it expands to [groups, rows, features], so
there the rows are walked in blocks that belong to one group each.

Axes: R rows sorted by group, E groups, D contracted, F output features.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


@jax.custom_vjp
def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """y [R, F] with y_r = x_r @ w[group of r].

    Args:
        sizes_E: int32, rows of each group in order; they sum to R.
    """
    return jax.lax.platform_dependent(
        x_RD, w_EDF, sizes_E, tpu=jax.lax.ragged_dot, default=_forward_blocks
    )


def _forward(x_RD, w_EDF, sizes_E):
    return grouped_matmul(x_RD, w_EDF, sizes_E), (x_RD, w_EDF, sizes_E)


def _backward(residuals, dy_RF):
    dx_RD, dw_EDF = jax.lax.platform_dependent(
        *residuals, dy_RF, tpu=_backward_ragged, default=_backward_blocks
    )
    return dx_RD, dw_EDF, None


grouped_matmul.defvjp(_forward, _backward)


def _backward_ragged(x_RD, w_EDF, sizes_E, dy_RF):
    _, pull = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, sizes_E), x_RD, w_EDF)
    return pull(dy_RF)


def block_rows(num_rows: int, num_groups: int) -> int:
    """Rows of a block: a power of two, about an eighth of its rows wasted on average."""
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
