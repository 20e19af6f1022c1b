# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Grouped matmul against a loop over rows, and its memory at many groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from jtok_jax.model.grouped_matmul import block_rows, grouped_matmul

SIZES = {
    "uneven": [3, 0, 41, 1, 0, 55, 0],
    "first only": [100, 0, 0],
    "last only": [0, 0, 100],
    "one group": [100],
    "one row": [0, 1, 0],
    "single rows": [1] * 100,
}


@pytest.fixture(params=["one by one", "at once", "seven at once"])
def blocks(request, monkeypatch):
    """As on a CPU, and as on a GPU: on a CPU platform_dependent never takes that by itself."""
    if request.param != "one by one":
        choose = lambda *args, cuda, **_: cuda(*args)
        monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    if request.param == "seven at once":
        monkeypatch.setattr("jtok_jax.model.grouped_matmul.AT_ONCE", 7 * 4 * 7 * 5)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("rest", [0, 9])
@pytest.mark.parametrize("name", SIZES)
def test_values_and_gradients_equal_a_loop(name, rest):
    """rest: rows past the last group, which may come out as anything and take no gradient."""
    sizes = np.array(SIZES[name], np.int32)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((sizes.sum() + rest, 7))
    w = rng.standard_normal((len(sizes), 7, 5))
    dy = rng.standard_normal((len(x), 5)) * (np.arange(len(x)) < sizes.sum())[:, None]
    group = np.repeat(np.arange(len(sizes)), sizes)
    y, pull = jax.vjp(
        lambda x, w: grouped_matmul(x, w, jnp.asarray(sizes)), jnp.float32(x), jnp.float32(w)
    )
    dx, dw = pull(jnp.float32(dy))
    expected_dw = np.zeros_like(w)
    for row, expert in enumerate(group):
        expected_dw[expert] += np.outer(x[row], dy[row])
    close = tolerances.FORWARD["float32"]
    np.testing.assert_allclose(y[: len(group)], [x[r] @ w[e] for r, e in enumerate(group)], **close)
    expected_dx = [w[e] @ dy[r] for r, e in enumerate(group)] + [[0] * 7] * rest
    np.testing.assert_allclose(dx, expected_dx, **close)
    np.testing.assert_allclose(dw, expected_dw, rtol=2e-5, atol=1e-4)


def test_rows_that_the_kernel_of_tpus_does_not_write_reach_no_token(monkeypatch):
    """Rows past the last group: that kernel leaves there what was in memory, here NaN."""
    ragged_dot, sizes = jax.lax.ragged_dot, jnp.array([3, 0, 5])
    unwritten = lambda y: jnp.where(jnp.arange(len(y))[:, None] < 8, y, jnp.nan)
    kernel = jax.custom_vjp(lambda *args: unwritten(ragged_dot(*args)))

    def backward(kept, dy):
        dx, dw, _ = jax.vjp(ragged_dot, *kept)[1](dy)
        return unwritten(dx), dw, None

    kernel.defvjp(lambda *args: (kernel(*args), args), backward)
    monkeypatch.setattr(jax.lax, "ragged_dot", kernel)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, tpu, **_: tpu(*args))
    x, w = jnp.ones((11, 7)), jnp.ones((3, 7, 5))
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes), x, w)
    dx, _ = pull(y)
    assert y[7, 0] == 7
    assert dx[7, 0] == 35
    assert not np.any(y[8:])
    assert not np.any(dx[8:])


def _temporaries(num_groups: int, function) -> int:
    """Compiled temporary bytes of value and gradients at 4096 rows."""

    def total(x, w, sizes):
        return jnp.sum(jnp.square(function(x, w, sizes)))

    shapes = [
        jax.ShapeDtypeStruct((4096, 64), jnp.float32),
        jax.ShapeDtypeStruct((num_groups, 64, 96), jnp.float32),
        jax.ShapeDtypeStruct((num_groups,), jnp.int32),
    ]
    compiled = jax.jit(jax.grad(total, argnums=(0, 1))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_temporaries_do_not_grow_with_groups():
    """Eight times the groups: the same temporaries, but for the gradient of the matrices itself."""
    few, many = (_temporaries(count, grouped_matmul) for count in (8, 64))
    gradient = (64 - 8) * 64 * 96 * 4
    assert many <= few + gradient, (few, many)
    assert many < 4 * 4096 * (64 + 96) * 4
    # The plain form this replaces does grow, so the comparison means something.
    assert _temporaries(64, jax.lax.ragged_dot) > 3 * _temporaries(8, jax.lax.ragged_dot)


def test_temporaries_of_a_gpu_do_not_grow_with_groups(monkeypatch):
    """But for the gradient of the matrices, and those of the blocks that are computed at once."""
    at_once = 1 << 20
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cuda, **_: cuda(*args))
    monkeypatch.setattr("jtok_jax.model.grouped_matmul.AT_ONCE", at_once)
    few, many = (_temporaries(count, grouped_matmul) for count in (8, 64))
    assert many <= few + (64 - 8) * 64 * 96 * 4 + at_once, (few, many)


def test_work_does_not_grow_with_groups():
    """Rows computed, padding included, for the worst and for even group sizes."""
    for num_groups in (8, 64):
        block = block_rows(4096, num_groups)
        worst = 4096 + num_groups * (block - 1)
        assert worst <= 1.3 * 4096, (num_groups, block)
