# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The table operations on small inputs, in every implementation that this machine can run."""

import functools

import jax
import jax.numpy as jnp
import kernel_oracle
import numpy as np
import pytest
from jtok_kernels import jtok, jtok_m, pack_rows, reference, row_plan
from jtok_kernels.choose import FIRST_JAX
from kernel_oracle import Inputs
from pythons import COMPILER_OPTIONS, oldest

KERNELS = jax.version.__version_info__ >= FIRST_JAX
IMPLEMENTATIONS = ["xla", "mosaic_tpu:interpret"]
IMPLEMENTATIONS += ["mosaic_gpu:interpret"] * KERNELS  # make test-latest has it
if jax.default_backend() == "gpu":  # JAX_PLATFORMS=cuda pytest tests/test_modulate.py
    IMPLEMENTATIONS = ["xla", "mosaic_gpu"]
each_implementation = pytest.mark.parametrize(
    "implementation",
    [pytest.param(x, marks=[oldest] * (x == "mosaic_tpu:interpret")) for x in IMPLEMENTATIONS],
)
GPU_KERNELS = next((name for name in IMPLEMENTATIONS if name.startswith("mosaic_gpu")), None)
OPERATIONS = ["jtok", "jtok_m"]
DEPTH_SCALE = 0.3
# name: ids, rows V, width D, tables E, tables a token K
CASES = {
    "repeated": ([4, 4, 1, 4, 1, 0, 22], 23, 128, 3, 2),
    "single id": ([5] * 67, 23, 128, 2, 1),
    "unique": ([3, 1, 4, 0, 5, 9, 2], 11, 256, 3, 3),
    "one token": ([6], 7, 128, 2, 2),
    "primes": (list(np.random.default_rng(0).zipf(1.2, 97) % 53), 53, 384, 5, 2),
    "more tokens than rows": (list(np.random.default_rng(0).integers(0, 13, 131)), 13, 512, 3, 2),
}


def inputs(case: str, dtype: str = "float32", zero_row: bool = False) -> Inputs:
    ids, num_rows, dim, num_tables, top_k = CASES[case]
    rng = np.random.default_rng(1)
    draw = lambda *shape: np.asarray(jnp.asarray(rng.standard_normal(shape), dtype), np.float64)
    count = len(ids)
    tables = draw(num_tables, num_rows, dim)
    if zero_row:
        tables[:, ids[0]] = 0
    choice = np.argsort(rng.random((count, num_tables)), axis=1)[:, :top_k]
    weights = np.float64(np.float32(rng.random((count, top_k)) + 0.1))
    scale = np.float64(np.float32(rng.standard_normal(dim)))
    h, delta, g = draw(count, dim), draw(count, dim), draw(count, dim)
    return Inputs(h, delta, tables, np.array(ids), choice, weights, scale, g)


def expected(operation: str, x: Inputs, norm: str, eps: float):
    form = {"norm": norm, "eps": eps}
    if operation == "jtok_m":
        form["depth_scale"] = DEPTH_SCALE
    forward = getattr(kernel_oracle, operation)(x, **form)
    return forward, getattr(kernel_oracle, f"{operation}_grads")(x, **form)


def run(
    operation,
    x: Inputs,
    dtype,
    norm,
    eps,
    implementation,
    *,
    packed=False,
    max_unique=None,
):
    """(out, gradients of delta, row gradients [E, U, D], of weights, of scale, unique ids)."""
    cast = lambda array: jnp.asarray(array, dtype)
    h, delta, g = cast(x.h), cast(x.delta), cast(x.g)
    single = cast(x.tables)
    # The layer used stands among others of the stack, which must not be read.
    stack = jnp.stack([jnp.full_like(single, jnp.nan), single, jnp.full_like(single, jnp.nan)])
    if packed or (implementation.startswith("mosaic_tpu") and dtype == "bfloat16"):
        stack = pack_rows(stack)
    ids, choice = jnp.int32(x.ids), jnp.int32(x.choice)
    plan = row_plan(ids, num_rows=x.tables.shape[1], max_unique=max_unique)
    size, dim = plan.unique_U.size, h.shape[1]
    options = {"norm": norm, "eps": eps, "layer": 1, "plan": plan}
    options["implementation"] = implementation
    scale, weights = jnp.float32(x.scale), jnp.float32(x.weights)

    @functools.partial(jax.jit, compiler_options=COMPILER_OPTIONS)
    def both(h, delta, weights, scale, stack, g):
        if operation == "jtok":
            zeros = jnp.zeros((size, dim))
            f = lambda h, delta, weights, scale, rows: jtok(
                h, delta, stack[:, 0], ids, scale, row_grads=rows, **options
            )
        else:
            zeros = jnp.zeros((x.tables.shape[0], size, dim))
            f = lambda h, delta, weights, scale, rows: jtok_m(
                h, delta, stack, ids, choice, weights, scale, row_grads=rows,
                depth_scale=DEPTH_SCALE, **options,
            )  # fmt: skip
        out, pull = jax.vjp(f, h, delta, weights, scale, zeros)
        return out, pull(g)

    out, (d_h, d_delta, d_weights, d_scale, rows) = both(h, delta, weights, scale, stack, g)
    np.testing.assert_array_equal(d_h, g)
    rows = rows[None] if operation == "jtok" else rows
    return out, d_delta, rows, d_weights, d_scale, plan.unique_U


def run_reference(operation, x: Inputs, dtype, norm, eps):
    """As `run`, by JAX's own derivatives of reference.py on gathered rows."""
    cast = lambda array: jnp.asarray(array, dtype)
    ids, choice, tables = jnp.int32(x.ids), jnp.int32(x.choice), cast(x.tables)
    form = {"norm": norm, "eps": eps, "depth_scale": None if operation == "jtok" else DEPTH_SCALE}

    def f(delta, tables, weights, scale):
        if operation == "jtok":
            e = tables[0, ids]
        else:
            e = reference.mix(tables[choice, ids[:, None]], weights)
        return reference.norm_add(cast(x.h), delta, e, scale, **form)

    # The tables are differentiated in float32, as the sums of every implementation are.
    arguments = tables.astype(jnp.float32), jnp.float32(x.weights), jnp.float32(x.scale)
    out, pull = jax.vjp(f, cast(x.delta), *arguments)
    d_delta, d_tables, d_weights, d_scale = pull(cast(x.g))
    rows = d_tables[:1] if operation == "jtok" else d_tables
    return out, d_delta, rows, d_weights, d_scale, jnp.arange(tables.shape[1])


def close(got, want, what, tolerance, terms=0.0):
    """Errors relative to the largest entry, or to `terms`, the size of what cancelled in it."""
    got, want = np.asarray(got, np.float64), np.asarray(want)
    assert np.all(np.isfinite(got)), what
    error = np.abs(got - want).max() / max(np.abs(want).max(), terms, 1e-30)
    assert error <= tolerance, f"{what}: {error:.2e}"
