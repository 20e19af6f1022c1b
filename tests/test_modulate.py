# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The table operations in every implementation against float64 loops; their promises."""

import functools

import jax
import jax.numpy as jnp
import kernel_oracle
import numpy as np
import pytest
from jtok_kernels import (
    dense_gradient,
    jtok,
    jtok_m,
    mix_rows,
    norm_add,
    pack_rows,
    row_plan,
    unpack_rows,
)
from jtok_kernels.choose import FIRST_JAX
from kernel_oracle import Inputs

KERNELS = jax.version.__version_info__ >= FIRST_JAX
IMPLEMENTATIONS = ["xla", "mosaic_tpu:interpret"]
IMPLEMENTATIONS += ["mosaic_gpu:interpret"] * KERNELS  # make test-latest has it
if jax.default_backend() == "gpu":  # JAX_PLATFORMS=cuda pytest tests/test_modulate.py
    IMPLEMENTATIONS = ["xla", "mosaic_gpu"]
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


def run(operation, x: Inputs, dtype, norm, eps, implementation, *, layer=1, packed=False):
    """(out, gradients of delta, row gradients [E, U, D], of weights, of scale, unique ids)."""
    cast = lambda array: jnp.asarray(array, dtype)
    h, delta, g = cast(x.h), cast(x.delta), cast(x.g)
    single = cast(x.tables)
    # The layer used stands among others of the stack, which must not be read.
    stack = jnp.stack([jnp.full_like(single, jnp.nan), single, jnp.full_like(single, jnp.nan)])
    if packed or (implementation.startswith("mosaic_tpu") and dtype == "bfloat16"):
        stack = pack_rows(stack)
    ids, choice = jnp.int32(x.ids), jnp.int32(x.choice)
    plan = row_plan(ids, num_rows=x.tables.shape[1])
    size, dim = plan.unique_U.size, h.shape[1]
    options = {"norm": norm, "eps": eps, "layer": layer, "plan": plan}
    options["implementation"] = implementation
    scale, weights = jnp.float32(x.scale), jnp.float32(x.weights)

    @jax.jit
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


def close(got, want, what, tolerance, terms=0.0):
    """Errors relative to the largest entry, or to `terms`, the size of what cancelled in it."""
    got, want = np.asarray(got, np.float64), np.asarray(want)
    assert np.all(np.isfinite(got)), what
    error = np.abs(got - want).max() / max(np.abs(want).max(), terms, 1e-30)
    assert error <= tolerance, f"{what}: {error:.2e}"


@pytest.mark.parametrize("norm", ["l2", "rms"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
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
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
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
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_errs_at_most_as_rounding_does(implementation, operation):
    """The result against float64 errs at most 1.5 times as float64 rounded to bfloat16 does."""
    x = inputs("more tokens than rows", "bfloat16")
    forward, grads = expected(operation, x, "l2", 1e-6)
    out, d_delta, rows, d_weights, d_scale, unique = run(
        operation, x, "bfloat16", "l2", 1e-6, implementation
    )

    def check(got, want, what, steps):
        """`steps` roundings to bfloat16 are unavoidable: of dm * p, and of the sums with h."""
        rounded = np.asarray(jnp.asarray(want, jnp.bfloat16), np.float64)
        own = np.sqrt(np.mean((rounded - want) ** 2))
        error = np.sqrt(np.mean((np.asarray(got, np.float64) - want) ** 2))
        assert error <= 1.5 * steps * own, f"{what}: {error / own:.2f} of its own rounding"

    check(out, forward, "out", 1 if operation == "jtok" else 1.5)
    if operation == "jtok":
        check(d_delta, grads.delta, "d_delta", 1)
    # Row gradients, d_scale and d_weights are float32 sums of bfloat16 inputs.
    dense = dense_gradient(rows, unique, num_rows=x.tables.shape[1])
    used = dense[:1] if operation == "jtok" else dense
    close(used, grads.tables[: len(used)], "row gradients", 1e-5)
    close(d_scale, grads.scale, "d_scale", 1e-5)
    if operation == "jtok_m":
        close(d_weights, grads.weights, "d_weights", 1e-5)


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


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_row_gradients_repeat_bit_for_bit(implementation, operation):
    """Over runs, and when tokens of other ids move: a row's sum depends on its own tokens alone."""
    x = inputs("primes")
    first = run(operation, x, "float32", "l2", 1e-6, implementation)
    again = run(operation, x, "float32", "l2", 1e-6, implementation)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    # Sorting by random keys per id moves runs against each other and keeps the order within.
    rng = np.random.default_rng(3)
    key = rng.random(x.tables.shape[1])[x.ids]
    shuffle = np.argsort(key, kind="stable")
    moved = Inputs(*(
        value if name in ("tables", "scale") else value[shuffle]
        for name, value in x._asdict().items()
    ))  # fmt: skip
    assert not np.array_equal(moved.ids, x.ids)
    other = run(operation, moved, "float32", "l2", 1e-6, implementation)
    np.testing.assert_array_equal(first[2], other[2])


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sums_without_rounding_do_not_depend_on_the_order_of_equal_ids(implementation, operation):
    """Tokens of one id change places among themselves; with whole numbers every sum is exact."""
    x = inputs("primes")
    whole = lambda value: np.round(4 * value)
    tables = np.zeros(x.tables.shape)
    tables[..., 0] = 3.0  # rows of norm 3: the derivative of the norm is the same for all tokens
    x = x._replace(delta=whole(x.delta), g=whole(x.g), tables=tables, scale=np.ones(x.scale.shape))
    x = x._replace(weights=np.full(x.weights.shape, 0.5))
    shuffle = np.arange(x.ids.size)
    rng = np.random.default_rng(4)
    for token in np.unique(x.ids):
        places = np.flatnonzero(x.ids == token)
        shuffle[places] = rng.permutation(places)
    moved = x._replace(
        delta=x.delta[shuffle], g=x.g[shuffle], choice=x.choice[shuffle], weights=x.weights[shuffle]
    )
    results = [run(operation, y, "float32", "l2", 0.0, implementation)[2] for y in (x, moved)]
    if operation == "jtok":
        np.testing.assert_array_equal(*results)
    else:  # depth_scale is no power of two: its products are rounded
        np.testing.assert_allclose(*results, rtol=1e-6, atol=1e-6)


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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
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


def test_packing_keeps_every_bit():
    bits = np.random.default_rng(0).integers(0, 1 << 16, (3, 7, 64), np.uint16)
    table = jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.bfloat16)
    finite = jnp.where(jnp.isnan(table), 0, table)
    packed = pack_rows(finite)
    assert packed.shape == (3, 7, 32)
    np.testing.assert_array_equal(unpack_rows(packed), finite)
    with pytest.raises(ValueError, match="expected bfloat16 of an even D"):
        pack_rows(finite[..., :63])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_packed_tables_give_the_bits_of_plain_ones(operation):
    x = inputs("unique", "bfloat16")
    plain, packed = (
        run(operation, x, "bfloat16", "rms", 1e-6, "xla", packed=packed) for packed in (False, True)
    )
    for a, b in zip(plain, packed, strict=True):
        np.testing.assert_array_equal(a, b)


def test_ids_outside_become_nan_where_nans_are_debugged():
    x = inputs("repeated")
    ids = jnp.int32(x.ids).at[2].set(23)
    arguments = *(jnp.float32(a) for a in (x.h, x.delta, x.tables[0])), ids, jnp.float32(x.scale)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="nan"):
        jax.block_until_ready(jtok(*arguments, eps=1e-6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"h": np.zeros((7, 64), np.float32)}, r"delta is float32 \(7, 128\); expected float32"),
        ({"h": np.zeros((7, 128), np.float16)}, "bfloat16 or float32"),
        ({"ids": np.zeros(7, np.int8)}, r"ids is int8 \(7,\); expected int32"),
        ({"ids": np.zeros(6, np.int32)}, r"ids is int32 \(6,\); expected \(7,\)"),
        ({"scale": np.zeros(64, np.float32)}, "scale is float32"),
        ({"table": np.zeros((1, 23, 128), np.float32)}, r"expected \[V, D\], or \[L, V, D\] with"),
        ({"table": np.zeros((23, 128), np.int32)}, "table is int32"),
        ({"norm": "l1"}, "norm is 'l1'; expected one of l2, rms"),
        ({"implementation": "cuda"}, "implementation is 'cuda'; expected one of xla, mosaic_gpu"),
        ({"implementation": "mosaic_gpu"}, "cannot run: .*; 'xla' can"),
        ({"implementation": "mosaic_tpu"}, "cannot run: the device is a cpu; 'xla' can"),
        ({"implementation": "xla:interpret"}, "expected one of xla"),
        ({"row_grads": np.zeros((7, 128), np.float32)}, "needs the plan"),
    ],
)
def test_wrong_arguments_are_refused_with_what_would_work(changes, message):
    x = inputs("repeated")
    arguments = {
        "h": np.float32(x.h), "delta": np.float32(x.delta), "table": np.float32(x.tables[0]),
        "ids": np.int32(x.ids), "scale": np.float32(x.scale), "eps": 1e-6,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        jtok(
            **jax.tree.map(
                lambda a: jnp.asarray(a) if isinstance(a, np.ndarray) else a, arguments | changes
            )
        )


def test_too_few_rows_for_gradients_are_refused():
    x = inputs("repeated")
    plan = row_plan(jnp.int32(x.ids), num_rows=23)
    arguments = [jnp.float32(a) for a in (x.h, x.delta, x.tables[0])]
    few = jnp.zeros((plan.unique_U.size - 1, 128))
    with pytest.raises(ValueError, match="every unique id needs a row, none is dropped"):
        jtok(*arguments, jnp.int32(x.ids), jnp.float32(x.scale), eps=1.0, plan=plan, row_grads=few)


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


# ---------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("microbatches", [0, 1, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_plan_holds_every_token_once_in_order(case, microbatches):
    ids, num_rows = np.array(CASES[case][0], np.int32), CASES[case][1]
    if microbatches:
        ids = np.stack([np.roll(ids, shift) for shift in range(microbatches)])
    plan = jax.jit(functools.partial(row_plan, num_rows=num_rows))(jnp.asarray(ids))
    unique = np.unique(ids)
    np.testing.assert_array_equal(plan.unique_U[: unique.size], unique)
    assert np.all(plan.unique_U[unique.size :] == num_rows)
    assert plan.unique_U.size == min(ids.size, num_rows)
    for index in range(max(microbatches, 1)):
        mine, order = ids, plan.order
        if microbatches:
            mine, order = ids[index], jax.tree.map(lambda x, index=index: x[index], plan.order)
        np.testing.assert_array_equal(plan.unique_U[order.place], mine)
        np.testing.assert_array_equal(order.token, np.argsort(mine, kind="stable"))
        found = []
        for run_, start, size in zip(
            order.piece_run, order.piece_start, order.piece_size, strict=True
        ):
            assert 0 <= size <= 32
            tokens = order.token[start : start + size]
            if size:
                assert np.all(mine[tokens] == plan.unique_U[run_])
                found.extend(tokens.tolist())
        assert found == order.token.tolist()
        pieces = np.maximum(1, -(-np.bincount(order.place, minlength=plan.unique_U.size) // 32))
        found = np.bincount(order.piece_run, minlength=plan.unique_U.size + 1)
        np.testing.assert_array_equal(found[:-1], pieces)
        split = np.flatnonzero(pieces > 1)
        np.testing.assert_array_equal(order.split_run[: split.size], split)
        assert np.all(order.split_run[split.size :] == plan.unique_U.size)
        for run_, first, end in zip(
            order.split_run, order.split_slot[:-1], order.split_slot[1:], strict=True
        ):
            slots = np.asarray(order.piece_slot)[np.asarray(order.piece_run) == run_]
            if run_ < plan.unique_U.size:
                np.testing.assert_array_equal(slots, np.arange(first, end))
            else:
                assert first == end
        assert np.sum(np.asarray(order.piece_slot) >= 0) == pieces[split].sum()


@pytest.mark.parametrize("ids", [np.zeros(0, np.int32), np.zeros(3), np.zeros((1, 2, 3), np.int32)])
def test_a_plan_needs_int32_ids(ids):
    with pytest.raises(ValueError, match="expected int32"):
        row_plan(jnp.asarray(ids), num_rows=5)
