# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Attention a chunk of queries at a time against all of them at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jtok_jax.model.attention import QUERIES, causal


@pytest.mark.parametrize("length", [1, 7, QUERIES, QUERIES + 3, 2 * QUERIES])
def test_chunks_equal_the_whole(length):
    rng = np.random.default_rng(length)
    draw = lambda heads: jnp.float32(rng.standard_normal((2, length, heads, 8)))
    query, key, value, weights = draw(4), draw(2), draw(2), draw(4)

    def loss(kind, *arrays):
        return jnp.sum(weights * causal(*arrays, kind=kind))

    value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=(1, 2, 3)), static_argnums=0)
    expected, found = (value_and_grad(kind, query, key, value) for kind in ("xla", "chunked"))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, expected, found)


def test_chunks_take_less_memory():
    shape = jax.ShapeDtypeStruct((1, 4 * QUERIES, 2, 8), jnp.float32)

    def temporaries(kind):
        run = jax.jit(jax.grad(lambda *x: jnp.sum(causal(*x, kind=kind) ** 2), argnums=(0, 1, 2)))
        return run.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("chunked") < 0.4 * temporaries("xla")
