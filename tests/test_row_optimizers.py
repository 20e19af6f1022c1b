# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Row optimizers: equal to AdamW where they promise it, and what each does elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jtok_kernels import (
    adamw,
    dense_gradient,
    lazy_adam,
    pack_rows,
    row_plan,
    rowwise_adagrad,
    rowwise_adam,
    unpack_rows,
    update_rows,
)
from jtok_kernels.rounding import round_at_random, row_seeds
from operations import GPU_KERNELS

V, D, B1, B2, EPS, RATE = 23, 5, 0.9, 0.95, 1e-8, 0.01
BETAS = {"b1": B1, "b2": B2, "eps": EPS}
SHAPES = {"one table": (V, D), "stack": (2, V, D), "stack of several": (2, 3, V, D)}


def make(kind, weight_decay=0.0):
    options = {"eps": EPS, "weight_decay": weight_decay}
    if kind is not rowwise_adagrad:
        options |= {"b1": B1, "b2": B2}
    return kind(**options)


SPARSE = [lazy_adam, rowwise_adam, rowwise_adagrad]
ALL = [adamw, *SPARSE]


class Run:
    """A table under an optimizer; `step` takes the ids of a step."""

    def __init__(self, optimizer, shape, dtype="float32", seed=0, key=None):
        self.rng = np.random.default_rng(seed)
        self.optimizer, self.key, self.count = optimizer, key, 0
        self.table = jnp.asarray(self.rng.standard_normal(shape), dtype)
        self.state = optimizer.init(self.table)
        self.update = jax.jit(functools.partial(update_rows, optimizer))

    def step(self, ids, rate=RATE, **options):
        plan = row_plan(jnp.int32(ids), num_rows=V)
        used = plan.unique_U < V
        shape = (*self.table.shape[:-2], plan.unique_U.size, D)
        grads = jnp.float32(self.rng.standard_normal(shape)) * used[:, None]
        self.count += 1
        if self.key is not None:
            options["rounding_key"] = jax.random.fold_in(self.key, self.count)
        self.table, self.state = self.update(
            self.table, self.state, plan.unique_U, grads,
            step=jnp.int32(self.count), learning_rate=jnp.float32(rate), **options,
        )  # fmt: skip
        return dense_gradient(grads, plan.unique_U, num_rows=V)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
def test_adamw_is_optax(shape, weight_decay):
    run = Run(make(adamw, weight_decay), SHAPES[shape])
    reference, table = optax.adamw(RATE, B1, B2, EPS, weight_decay=weight_decay), run.table
    state = reference.init(table)
    for ids in ([1, 2, 2], [22, 0, 1], [5, 1, 1]):
        updates, state = reference.update(run.step(ids), state, table)
        table = table + updates
        np.testing.assert_allclose(run.table, table, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("shape", SHAPES)
def test_lazy_adam_is_adamw_for_rows_of_every_step(shape, weight_decay):
    ids = list(range(V))
    lazy, dense = (Run(make(kind, weight_decay), SHAPES[shape]) for kind in (lazy_adam, adamw))
    for rate in (0.01, 0.02, 0.005, 0.0, 0.01):
        lazy.step(ids, rate)
        dense.step(ids, rate)
        np.testing.assert_allclose(lazy.table, dense.table, rtol=1e-5, atol=1e-6)


def test_lazy_moments_are_those_of_adamw_whatever_was_skipped():
    """After a gap b^gap makes up for it exactly, where the row is touched again."""
    lazy, dense = (Run(make(kind), (V, D)) for kind in (lazy_adam, adamw))
    for ids in ([1, 2, 3], [4, 5, 4], [6, 6, 6], [2, 7, 8], [1, 2, 3]):
        lazy.step(ids)
        dense.step(ids)
    for name in ("m", "v"):
        np.testing.assert_allclose(
            lazy.state[name][1:4], dense.state[name][1:4], rtol=1e-5, atol=1e-7
        )


def test_a_rarely_used_row_moves_by_the_rate_where_adamw_moves_less_and_then_on():
    """The difference the docstring states, in numbers."""
    moved = {}
    for kind in (lazy_adam, adamw):
        run = Run(make(kind), (V, D))
        for _ in range(200):
            run.step([0, 1])
        before = np.asarray(run.table[9])
        run.step([9, 9])
        at_once = np.abs(run.table[9] - before)
        for _ in range(100):
            run.step([0, 1])
        moved[kind] = at_once / RATE, np.abs(run.table[9] - before) / RATE
    np.testing.assert_allclose(moved[lazy_adam][0], 1.0, rtol=1e-4)
    np.testing.assert_allclose(moved[lazy_adam][1], 1.0, rtol=1e-4)
    np.testing.assert_allclose(moved[adamw][0], 0.1 / 0.05**0.5, rtol=1e-4)
    assert np.all(moved[adamw][1] > 5)


@pytest.mark.parametrize("kind", SPARSE)
def test_decay_is_caught_up_by_the_exact_product(kind):
    """With gradients too small to matter a row touched at the end has decayed in every step."""
    run = Run(make(kind, weight_decay=0.5), (V, D))
    start, rates = run.table, [0.1, 0.02, 0.3, 0.0, 0.1]
    for rate in rates[:-1]:
        run.step([1, 2], rate)
    assert np.array_equal(run.table[7], start[7]), "decay of untouched rows is lazy"
    unique, zero = jnp.int32([7, V]), jnp.zeros((2, D))
    tiny = zero.at[0].set(1e-30)  # counts as a touch; Adam's eps hides it
    table, _ = run.update(
        run.table, run.state, unique, tiny, step=jnp.int32(5), learning_rate=jnp.float32(0.1)
    )
    expected = start[7] * np.prod([1 - rate * 0.5 for rate in rates])
    np.testing.assert_allclose(table[7], expected, rtol=1e-5)


def test_decay_is_right_after_a_million_steps():
    """The last thousand, of which a plain float32 sum would miss some percent."""
    optimizer, rate, steps = make(lazy_adam, weight_decay=0.1), 1e-2, 1000
    table = jnp.ones((V, D))
    value = np.log1p(-np.float32(rate) * np.float32(0.1))
    before = np.float32(1_000_000 * np.float64(value))
    state = optimizer.init(table) | {
        "log_decay": jnp.float32(before), "decayed": jnp.full(V, before)
    }  # fmt: skip
    zero, ids = jnp.zeros((1, D)), lambda row: jnp.int32([row])

    def body(state, step):
        update = functools.partial(update_rows, optimizer, learning_rate=rate, step=step)
        return update(table, state, ids(V), zero)[1], None

    state, _ = jax.lax.scan(body, state, jnp.arange(1, steps))
    last = {"step": jnp.int32(steps), "learning_rate": rate}
    found, _ = update_rows(optimizer, table, state, ids(3), zero.at[0].set(1e-30), **last)
    np.testing.assert_allclose(found[3], np.exp(steps * np.float64(value)), rtol=2e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", SPARSE)
def test_rows_without_gradient_keep_every_bit(kind, shape):
    run = Run(make(kind, 0.1), SHAPES[shape])
    run.step([3, 4, 4, 9])
    table, state = run.table, run.state
    run.step([1, 9, 9, 1])
    others = [row for row in range(V) if row not in (1, 9)]
    np.testing.assert_array_equal(run.table[..., others, :], table[..., others, :])
    assert np.any(run.table[..., [1, 9], :] != table[..., [1, 9], :])
    for name, value in run.state.items():
        if value.ndim:
            axis = value.ndim - (2 if value.ndim == table.ndim else 1)
            pick = lambda x, axis=axis: np.take(x, others, axis)
            np.testing.assert_array_equal(pick(value), pick(state[name]), err_msg=name)


def test_row_of_zero_gradient_among_the_unique_is_not_touched():
    """JTok-M: a token whose router did not choose a table leaves its row there alone."""
    run = Run(make(lazy_adam), (1, 2, V, D))
    grads = jnp.ones((1, 2, 2, D)).at[0, 1, 0].set(0.0)
    table, _ = run.update(
        run.table, run.state, jnp.int32([3, 5]), grads,
        step=jnp.int32(1), learning_rate=jnp.float32(RATE),
    )  # fmt: skip
    np.testing.assert_array_equal(table[0, 1, 3], run.table[0, 1, 3])
    for place in ((0, 0, 3), (0, 0, 5), (0, 1, 5)):
        np.testing.assert_allclose(table[place], run.table[place] - RATE, rtol=1e-5)


def test_rowwise_optimizers_by_hand():
    for kind in (rowwise_adam, rowwise_adagrad):
        run = Run(make(kind), (V, D))
        row, m, v, total = np.float64(run.table[3]), 0.0, 0.0, 0.0
        for count in range(1, 4):
            g = np.float64(run.step([3])[3])
            m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * np.mean(g**2)
            total += np.mean(g**2)
            if kind is rowwise_adam:
                row = row - RATE * m / (1 - B1**count) / np.sqrt(v / (1 - B2**count))
            else:
                row = row - RATE * g / np.sqrt(total)
            np.testing.assert_allclose(run.table[3], row, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ALL)
def test_a_step_that_is_not_applied_changes_nothing(kind, shape):
    run = Run(make(kind, 0.1), SHAPES[shape])
    run.step([3, 4, 4])
    table, state = run.table, run.state
    run.step([3, 1, 1], apply=jnp.bool_(False))
    np.testing.assert_array_equal(run.table, table)
    for name in state:
        np.testing.assert_array_equal(run.state[name], state[name], err_msg=name)


def test_stochastic_rounding_is_right_on_average_where_rounding_loses_the_step():
    """Steps of 1e-3 at entries of size 1: bfloat16 has 1/128 there, and forgets them to nearest."""
    finals = {}
    for name, key in (("nearest", None), ("stochastic", jax.random.key(0))):
        run = Run(make(rowwise_adagrad), (V, D), "bfloat16", key=key)
        run.table = jnp.ones((V, D), jnp.bfloat16)
        unique, grads = jnp.arange(V, dtype=jnp.int32), jnp.ones((V, D))
        for count in range(1, 101):
            options = {"rounding_key": jax.random.fold_in(key, count)} if key is not None else {}
            rate = jnp.float32(1e-3 * count**0.5)  # Adagrad divides by the root of the count
            run.table, run.state = run.update(
                run.table, run.state, unique, grads, step=jnp.int32(count), learning_rate=rate,
                **options,
            )  # fmt: skip
        finals[name] = np.float64(run.table)
    assert np.all(finals["nearest"] == 1.0)
    assert abs(finals["stochastic"].mean() - 0.9) < 0.01
    assert finals["stochastic"].std() < 0.05


def test_stochastic_rounding_keeps_what_bfloat16_holds_and_what_is_not_finite():
    run = Run(make(rowwise_adagrad), (V, D), "bfloat16", key=jax.random.key(0))
    exact, zero = run.table, jnp.float32(0)
    run.step(list(range(V)), rate=zero)
    np.testing.assert_array_equal(run.table, exact)
    odd = jnp.float32([jnp.inf, -jnp.inf, jnp.nan, 0.0])
    kept = round_at_random(odd, jnp.uint32(7), jnp.arange(4, dtype=jnp.uint32))
    np.testing.assert_array_equal(np.float32(kept), odd)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", SPARSE)
def test_the_update_is_in_place_and_holds_no_table(kind, dtype):
    """Donated tables and moments are reused; temporaries are those of the rows of one layer."""
    optimizer, num_rows, unique, dim = make(kind), 1 << 14, 256, 64
    table = jax.ShapeDtypeStruct((3, 2, num_rows, dim), dtype)
    state = jax.eval_shape(optimizer.init, table)
    grads = jax.ShapeDtypeStruct((3, 2, unique, dim), jnp.float32)
    scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype)

    def update(table, state, unique_U, grads, step, rate, key):
        options = {"step": step, "learning_rate": rate, "rounding_key": key}
        return update_rows(optimizer, table, state, unique_U, grads, **options)

    key = jax.eval_shape(lambda: jax.random.key(0))
    arguments = jax.ShapeDtypeStruct((unique,), jnp.int32), grads
    compiled = (
        jax.jit(update, donate_argnums=(0, 1))
        .lower(table, state, *arguments, scalar(jnp.int32), scalar(jnp.float32), key)
        .compile()
    )
    memory = compiled.memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((table, state)))
    assert memory.alias_size_in_bytes == held
    if dtype == "bfloat16" and jax.version.__version_info__ < (0, 12):
        pytest.skip("XLA on the CPU copies the operand of a bfloat16 scatter before JAX 0.12")
    one_table = num_rows * dim * table.dtype.itemsize
    assert memory.temp_size_in_bytes < one_table, memory.temp_size_in_bytes / one_table


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ALL)
def test_packed_tables_are_updated_to_the_same_bits(kind, shape):
    size = (*SHAPES[shape][:-1], 6)
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.standard_normal(size), jnp.bfloat16)
    optimizer, unique = make(kind, 0.1), jnp.int32([2, 7, V])
    grads = jnp.float32(rng.standard_normal((*size[:-2], 3, 6)))
    results = []
    for start in (table, pack_rows(table)):
        state = optimizer.init(start)
        options = {"step": jnp.int32(1), "learning_rate": jnp.float32(0.1)}
        options["rounding_key"] = jax.random.key(0)
        results.append(update_rows(optimizer, start, state, unique, grads, **options))
    (plain, plain_state), (packed, packed_state) = results
    np.testing.assert_array_equal(plain, unpack_rows(packed))
    for name in plain_state:
        np.testing.assert_array_equal(plain_state[name], packed_state[name], err_msg=name)


@pytest.mark.skipif(GPU_KERNELS is None, reason="the GPU kernels need JAX 0.11.1")
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", SPARSE)
def test_the_update_kernel_equals_xla(kind, dtype, weight_decay):
    """The second step is not applied; a table without gradient and places without id stay."""
    optimizer, shape, results = make(kind, weight_decay), (2, 3, V, 128), []
    for implementation in ("xla", GPU_KERNELS):
        rng = np.random.default_rng(0)
        table = jnp.asarray(rng.standard_normal(shape), dtype)
        state = optimizer.init(table)
        update = jax.jit(functools.partial(update_rows, optimizer, implementation=implementation))
        for count, ids in enumerate(([1, 2, 2, 5], [5, 1, 0, 22], [2, 2, 2, 2]), 1):
            plan = row_plan(jnp.int32(ids), num_rows=V)
            grads = rng.standard_normal((2, 3, 4, 128)) * (plan.unique_U < V)[:, None]
            grads = jnp.float32(grads).at[0, 1].set(0)
            if count == 3:  # one entry that is not finite among zeros is a touch, too
                grads = grads.at[1, 2].set(0).at[1, 2, 0, 5].set(jnp.nan)
            table, state = update(
                table, state, plan.unique_U, grads,
                step=jnp.int32(count), learning_rate=jnp.float32(RATE), apply=count != 2,
                grad_scale=jnp.float32(0.5), rounding_key=jax.random.key(count),
            )  # fmt: skip
        results.append((table, state))
    (plain, plain_state), (kernel, kernel_state) = results
    np.testing.assert_allclose(np.float32(kernel), np.float32(plain), rtol=1e-6, atol=1e-6)
    for name, value in plain_state.items():
        np.testing.assert_allclose(kernel_state[name], value, rtol=1e-6, err_msg=name)
    assert np.any(plain[0, 0] != plain[0, 1])
    assert np.any(np.isnan(np.float32(kernel[1, 2, 2])))


def test_gradients_are_scaled_as_if_they_came_so():
    runs = [Run(make(rowwise_adagrad), (V, D)) for _ in range(2)]
    unique, grads = jnp.int32([2, 7]), jnp.float32(runs[0].rng.standard_normal((2, D)))
    options = {"step": jnp.int32(1), "learning_rate": jnp.float32(RATE)}
    results = []
    for run, scale in zip(runs, (1.0, 0.25), strict=True):
        arguments = run.table, run.state, unique, grads * (0.25 / scale)
        results.append(run.update(*arguments, **options, grad_scale=scale))
    (table, state), (other, other_state) = results
    np.testing.assert_array_equal(table, other)
    np.testing.assert_array_equal(state["sum"], other_state["sum"])


def test_the_hash_that_rounds_is_uniform_and_differs_by_step_row_and_entry():
    """Mean and variance of the thresholds, and no correlation between neighbours of any kind."""
    values = jnp.full((64, 256), 1 + 0.3 / 128)  # 0.3 of the way to the next bfloat16
    up = []
    for step in range(8):
        seeds = row_seeds(jax.random.key_data(jax.random.key(step)), 0, jnp.arange(64))
        entries = jnp.arange(256, dtype=jnp.uint32)
        up.append(np.float64(round_at_random(values, seeds[:, None], entries)) > 1)
    up = np.array(up)
    assert abs(up.mean() - 0.3) < 5 * (0.21 / up.size) ** 0.5
    centred = up - up.mean()
    for axis in range(3):
        moved = np.roll(centred, 1, axis)
        assert abs(np.mean(centred * moved)) < 5 * 0.21 / up.size**0.5
