# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A table of more than 4 GiB is read, differentiated and updated at its far end."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jtok_kernels import jtok, row_plan, rowwise_adagrad, update_rows

ROWS, DIM = 2_600_000, 1024  # bfloat16: 4.96 GiB
IDS = [0, ROWS - 1, ROWS - 2, 1 << 21, (1 << 21) + 1, 1 << 20, ROWS - 1]


@pytest.mark.skipif(
    jax.default_backend() != "gpu" and "BIG_TABLES" not in os.environ,
    reason="takes 5 GiB; runs on a GPU, or with BIG_TABLES=1 where memory allows",
)
def test_rows_at_the_far_end_of_a_big_table():
    ids, unique = jnp.int32(IDS), sorted(set(IDS))
    rows = np.float32(jnp.asarray(np.random.default_rng(0).standard_normal((6, DIM)), jnp.bfloat16))
    fill = lambda rows: jnp.zeros((ROWS, DIM), jnp.bfloat16).at[jnp.int32(unique)].set(rows)
    table = jax.jit(fill)(jnp.bfloat16(rows))
    assert table.nbytes > 1 << 32
    plan = row_plan(ids, num_rows=ROWS)
    h, ones, eps = jnp.zeros((len(IDS), DIM)), jnp.ones(DIM), 0.1
    call = lambda table, row_grads: jtok(
        h, h + 1.0, table, ids, ones, eps=eps, plan=plan, row_grads=row_grads
    )
    zeros = jnp.zeros((len(IDS), DIM))
    out, grads = jax.jit(
        lambda table: (call(table, zeros), jax.grad(lambda z: call(table, z).sum())(zeros))
    )(table)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    place = [unique.index(token) for token in IDS]
    np.testing.assert_allclose(out, (1 + rows / (norm + eps))[place], rtol=1e-5, atol=1e-6)
    along = rows.sum(axis=1, keepdims=True) / (norm * (norm + eps) ** 2)
    count = np.bincount(place)[:, None]
    expected = count * (1 / (norm + eps) - rows * along)
    np.testing.assert_allclose(grads[:6], expected, rtol=1e-4, atol=1e-6)

    optimizer = rowwise_adagrad(eps=1e-8, weight_decay=0.0)
    state = optimizer.init(table)
    update = jax.jit(functools.partial(update_rows, optimizer), donate_argnums=(0, 1))
    arguments = plan.unique_U, grads
    table, _ = update(table, state, *arguments, step=jnp.int32(1), learning_rate=jnp.float32(0.5))
    moved = 0.5 * expected / np.sqrt(np.mean(expected**2, axis=1, keepdims=True))
    after = np.float32(table[jnp.int32(unique)])
    np.testing.assert_allclose(after, rows - moved, rtol=1e-2, atol=1e-2)
    neighbours = jnp.int32([1, ROWS - 3, (1 << 21) - 1, (1 << 20) + 1])
    assert not np.any(np.float32(table[neighbours]))
