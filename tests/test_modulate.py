# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The table operations in every implementation against float64 loops; their promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jtok_kernels import NORMS, dense_gradient, jtok, jtok_m, mix_rows, norm_add, row_plan
from kernel_oracle import Inputs
from operations import (
    CASES,
    DEPTH_SCALE,
    OPERATIONS,
    close,
    each_implementation,
    expected,
    inputs,
    run,
    run_reference,
)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("operation", OPERATIONS)
@each_implementation
def test_values_and_gradients_equal_float64(implementation, operation, case, norm):
    x, eps = inputs(case), 1e-3
    forward, grads = expected(operation, x, norm, eps)
    out, d_delta, rows, d_weights, d_scale, unique = run(
        operation, x, "float32", norm, eps, implementation
    )
    dense = dense_gradient(rows, unique, num_rows=x.tables.shape[1])
    close(out, forward, "out", 3e-6)
    close(d_delta, grads.delta, "d_delta", 3e-6)
    close(d_scale, grads.scale, "d_scale", 1e-5)
    used = dense[:1] if operation == "jtok" else dense
    close(used, grads.tables[: len(used)], "row gradients", 1e-5)
    if operation == "jtok_m":
        # Scaling a row changes nothing: with K = 1 a weight's gradient is what eps leaves of it.
        q = DEPTH_SCALE * np.linalg.norm(x.scale * x.g, axis=1).max()
        close(d_weights, grads.weights, "d_weights", 1e-5, terms=q)


@pytest.mark.parametrize("operation", OPERATIONS)
@each_implementation
def test_zero_rows_give_the_gradient_of_the_limit(implementation, operation):
    x = inputs("repeated", zero_row=True)
    forward, grads = expected(operation, x, "l2", 0.1)
    out, _, rows, _, d_scale, unique = run(operation, x, "float32", "l2", 0.1, implementation)
    close(out, forward, "out", 3e-6)
    close(d_scale, grads.scale, "d_scale", 1e-5)
    dense = dense_gradient(rows, unique, num_rows=x.tables.shape[1])
    used = dense[:1] if operation == "jtok" else dense
    close(used, grads.tables[: len(used)], "row gradients", 1e-5)


@pytest.mark.parametrize("operation", OPERATIONS)
@each_implementation
def test_bfloat16_errs_at_most_as_the_reference_does(implementation, operation):
    """Root mean square errors against float64, at most 1.5 times those of reference.py."""
    x = inputs("more tokens than rows", "bfloat16")
    forward, grads = expected(operation, x, "l2", 1e-6)
    used = slice(0, 1 if operation == "jtok" else None)
    wanted = {"out": forward, "d_delta": grads.delta, "rows": grads.tables[used]}
    wanted |= {"d_weights": grads.weights} if operation == "jtok_m" else {}
    wanted["d_scale"] = grads.scale

    def errors(result):
        out, d_delta, rows, d_weights, d_scale, unique = result
        dense = dense_gradient(rows, unique, num_rows=x.tables.shape[1])[used]
        got = {"out": out, "d_delta": d_delta, "rows": dense, "d_weights": d_weights}
        got["d_scale"] = d_scale
        difference = lambda name: np.asarray(got[name], np.float64) - wanted[name]
        size = lambda name: np.sqrt(np.mean(wanted[name] ** 2))
        return {name: np.sqrt(np.mean(difference(name) ** 2)) / size(name) for name in wanted}

    arguments = operation, x, "bfloat16", "l2", 1e-6
    ours, theirs = errors(run(*arguments, implementation)), errors(run_reference(*arguments))
    assert theirs["out"] > 1e-4  # bfloat16 is at work
    for name, error in ours.items():
        # Sums in float32 of the same inputs may differ by their own rounding.
        assert error <= 1.5 * theirs[name] + 1e-6, f"{name}: {error:.2e}, {theirs[name]:.2e}"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_hand_written_derivatives_equal_differences(operation):
    x = inputs("repeated")
    _, grads = expected(operation, x, "l2", 0.2)
    rng = np.random.default_rng(2)
    names = ["delta", "tables", "scale"] + ["weights"] * (operation == "jtok_m")
    for name in names:
        value = getattr(x, name)
        direction = rng.standard_normal(value.shape)
        ends = [x._replace(**{name: value + sign * 1e-5 * direction}) for sign in (1, -1)]
        outs = [expected(operation, end, "l2", 0.2)[0] for end in ends]
        difference = np.sum(x.g * (outs[0] - outs[1])) / 2e-5
        np.testing.assert_allclose(np.sum(getattr(grads, name) * direction), difference, rtol=1e-6)


def shuffled(x: Inputs, shuffle: np.ndarray) -> Inputs:
    whole = ("tables", "scale")
    return Inputs(*(v if name in whole else v[shuffle] for name, v in x._asdict().items()))


@pytest.mark.parametrize("operation", OPERATIONS)
@each_implementation
def test_row_gradients_repeat_bit_for_bit(implementation, operation):
    """Over runs, and when tokens of other ids move: a row's sum depends on its own tokens alone."""
    x = inputs("primes")
    first = run(operation, x, "float32", "l2", 1e-6, implementation)
    again = run(operation, x, "float32", "l2", 1e-6, implementation)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    # Sorting by random keys per id moves runs against each other and keeps the order within.
    key = np.random.default_rng(3).random(x.tables.shape[1])[x.ids]
    moved = shuffled(x, np.argsort(key, kind="stable"))
    assert not np.array_equal(moved.ids, x.ids)
    other = run(operation, moved, "float32", "l2", 1e-6, implementation)
    np.testing.assert_array_equal(first[2], other[2])


@pytest.mark.parametrize("operation", OPERATIONS)
@each_implementation
def test_a_tight_bound_gives_the_same_bits_and_an_overflow_nan(implementation, operation):
    x = inputs("primes")
    used = np.unique(x.ids).size
    first, tight, over = (
        run(operation, x, "float32", "l2", 1e-6, implementation, max_unique=bound)
        for bound in (None, used, used - 1)
    )
    for name, index in (("out", 0), ("d_delta", 1), ("d_weights", 3)):
        np.testing.assert_array_equal(first[index], tight[index], err_msg=name)
    assert tight[2].shape[1] == used < first[2].shape[1]
    np.testing.assert_array_equal(first[2][:, :used], tight[2])
    np.testing.assert_array_equal(first[0], over[0])  # the forward pass knows no plan
    made_with_the_plan = {"jtok": (1, 2, 4), "jtok_m": (2, 3, 4)}[operation]
    assert all(np.any(np.isnan(over[index])) for index in made_with_the_plan)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("case", ["primes", "single id", "one token"])
def test_the_sums_that_gpus_take_in_plain_xla_equal_float64(case, operation, monkeypatch):
    """On a CPU platform_dependent never takes that branch by itself."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cuda, **_: cuda(*args))
    x = inputs(case)
    _, grads = expected(operation, x, "l2", 1e-3)
    first, again = (run(operation, x, "float32", "l2", 1e-3, "xla") for _ in range(2))
    dense = dense_gradient(first[2], first[5], num_rows=x.tables.shape[1])
    used = dense[:1] if operation == "jtok" else dense
    close(used, grads.tables[: len(used)], "row gradients", 1e-5)
    np.testing.assert_array_equal(first[2], again[2])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_dense_gradient_is_that_of_a_plain_gather(operation):
    x = inputs("repeated")
    _, grads = expected(operation, x, "l2", 0.1)
    h, delta, tables, g = (jnp.float32(a) for a in (x.h, x.delta, x.tables, x.g))
    ids, scale = jnp.int32(x.ids), jnp.float32(x.scale)
    options = {"eps": 0.1, "norm": "l2"}

    def single(tables):
        if operation == "jtok":
            return jnp.vdot(g, jtok(h, delta, tables[0], ids, scale, **options))
        choice, weights = jnp.int32(x.choice), jnp.float32(x.weights)
        options["depth_scale"] = DEPTH_SCALE
        return jnp.vdot(g, jtok_m(h, delta, tables, ids, choice, weights, scale, **options))

    close(jax.grad(single)(tables), grads.tables, "dense gradient", 1e-5)


@each_implementation
def test_mix_rows_and_norm_add_make_the_whole_from_column_shards(implementation):
    """mix_rows on parts of the columns, norm_add on the whole: values and gradients of jtok_m."""
    x = inputs("unique")
    options = {"implementation": implementation}
    h, delta, tables, g = (jnp.float32(a) for a in (x.h, x.delta, x.tables, x.g))
    ids, choice = jnp.int32(x.ids), jnp.int32(x.choice)
    plan = row_plan(ids, num_rows=x.tables.shape[1])
    half = x.h.shape[1] // 2
    zeros = jnp.zeros((2, x.tables.shape[0], plan.unique_U.size, half))

    def in_parts(h, delta, weights, scale, rows):
        parts = [
            mix_rows(
                tables[..., part], ids, choice, weights, plan=plan, row_grads=rows[index], **options
            )
            for index, part in enumerate([slice(0, half), slice(half, None)])
        ]
        form = {"depth_scale": DEPTH_SCALE, "eps": 1e-3}
        return norm_add(h, delta, jnp.concatenate(parts, axis=1), scale, **form)

    arguments = h, delta, jnp.float32(x.weights), jnp.float32(x.scale), zeros
    out, pull = jax.vjp(in_parts, *arguments)
    forward, grads = expected("jtok_m", x, "l2", 1e-3)
    _, d_delta, d_weights, d_scale, rows = pull(g)
    close(out, forward, "out", 3e-6)
    close(d_delta, grads.delta, "d_delta", 3e-6)
    close(d_weights, grads.weights, "d_weights", 1e-5)
    close(d_scale, grads.scale, "d_scale", 1e-5)
    whole = jnp.concatenate([rows[0], rows[1]], axis=-1)
    dense = dense_gradient(whole, plan.unique_U, num_rows=x.tables.shape[1])
    close(dense, grads.tables, "row gradients", 1e-5)


@each_implementation
def test_mix_rows_of_one_table_are_its_rows(implementation):
    x = inputs("repeated")
    table, ids, g = jnp.float32(x.tables[0]), jnp.int32(x.ids), jnp.float32(x.g)
    plan = row_plan(ids, num_rows=table.shape[0])
    zeros = jnp.zeros((plan.unique_U.size, table.shape[1]))
    options = {"plan": plan, "implementation": implementation}
    out, pull = jax.vjp(lambda rows: mix_rows(table, ids, row_grads=rows, **options), zeros)
    np.testing.assert_array_equal(out, table[ids])
    expected_ = np.zeros(table.shape)
    np.add.at(expected_, x.ids, x.g)
    close(dense_gradient(pull(g)[0], plan.unique_U, num_rows=23), expected_, "rows", 1e-6)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_packed_tables_give_the_bits_of_plain_ones(operation):
    x = inputs("unique", "bfloat16")
    plain, packed = (
        run(operation, x, "bfloat16", "rms", 1e-6, "xla", packed=packed) for packed in (False, True)
    )
    for a, b in zip(plain, packed, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_scan_over_layers_holds_no_table_beside_the_stack(operation):
    """Forward and backward: temporaries do not grow with V, so no slice, copy or dense gradient."""

    def temporaries(num_rows):
        layers, tokens, dim, num_tables = 3, 64, 128, 2
        several = () if operation == "jtok" else (num_tables,)
        shape = jax.ShapeDtypeStruct
        stack = shape((layers, *several, num_rows, dim), jnp.float32)
        h, ids = shape((tokens, dim), jnp.float32), shape((tokens,), jnp.int32)
        choice, weights = shape((tokens, 2), jnp.int32), shape((tokens, 2), jnp.float32)

        def gradients(h, stack, scale, ids, choice, weights):
            plan = row_plan(ids, num_rows=num_rows)

            def body(h, layer):
                index, rows = layer
                options = {"layer": index, "plan": plan, "row_grads": rows, "eps": 1e-6}
                if operation == "jtok":
                    return jtok(h, h, stack, ids, scale, **options), None
                options["depth_scale"] = DEPTH_SCALE
                return jtok_m(h, h, stack, ids, choice, weights, scale, **options), None

            def loss(rows, h):
                return jax.lax.scan(body, h, (jnp.arange(layers), rows))[0].sum()

            rows = jnp.zeros((layers, *several, plan.unique_U.size, dim))
            return jax.grad(loss, argnums=(0, 1))(rows, h)

        scale = shape((dim,), jnp.float32)
        lowered = jax.jit(gradients).lower(h, stack, scale, ids, choice, weights)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(1 << 14) <= temporaries(1 << 10) + 4096
