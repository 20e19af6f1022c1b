# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Wrong arguments of the table operations are refused, with what would work."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jtok_kernels import (
    adamw,
    choose,
    jtok,
    jtok_m,
    lazy_adam,
    mix_rows,
    modulate,
    norm_add,
    row_plan,
    rowwise_adagrad,
    update_rows,
)
from operations import IMPLEMENTATIONS, KERNELS, each_implementation, inputs, run

choosing = sys.modules["jtok_kernels.choose"]  # the package's `choose` is the function


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


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_outside_the_stack_is_refused(layer):
    x = inputs("repeated")
    stack = jnp.zeros((3, 23, 128))
    arguments = jnp.float32(x.h), jnp.float32(x.delta), stack, jnp.int32(x.ids), jnp.ones(128)
    with pytest.raises(ValueError, match=f"layer is {layer}; expected one of the 3 of table"):
        jtok(*arguments, eps=1e-6, layer=layer)


def test_choice_and_weights_go_together():
    x = inputs("repeated")
    tables, ids, weights = jnp.float32(x.tables), jnp.int32(x.ids), jnp.float32(x.weights)
    with pytest.raises(ValueError, match="choice and weights go together"):
        mix_rows(tables[0], ids, None, weights)


def test_row_gradients_of_one_table_are_refused_for_several():
    x = inputs("repeated")
    ids = jnp.int32(x.ids)
    plan = row_plan(ids, num_rows=23)
    stream = [jnp.float32(a) for a in (x.h, x.delta, x.tables)]
    choice, weights = jnp.int32(x.choice), jnp.float32(x.weights)
    one = jnp.zeros((plan.unique_U.size, 128))
    options = {"depth_scale": 1.0, "eps": 1.0, "plan": plan, "row_grads": one}
    with pytest.raises(
        ValueError, match=r"row_grads is float32 \(7, 128\); expected float32 \(3, 7"
    ):
        jtok_m(*stream, ids, choice, weights, jnp.float32(x.scale), **options)


@each_implementation
@pytest.mark.parametrize("operation", ["jtok", "jtok_m"])
def test_a_broken_row_nobody_reads_breaks_nothing(implementation, operation):
    """The plan has places without an id; what they read must not reach a gradient."""
    x = inputs("repeated")  # uses ids 0, 1, 4 and 22
    x = x._replace(ids=np.where(x.ids == 22, 21, x.ids))
    x.tables[:, 22] = np.nan
    results = run(operation, x, "float32", "l2", 1e-6, implementation)
    assert all(np.all(np.isfinite(value)) for value in results)


@each_implementation
@pytest.mark.parametrize("ids", [[-7, 23], [1 << 30, -(1 << 31)]])
def test_ids_outside_stay_inside_the_table(implementation, ids):
    """As the nearest inside, forward and backward, in every implementation."""
    x = inputs("repeated")
    ids = jnp.int32(x.ids).at[:2].set(jnp.int32(jnp.array(ids)))
    h, delta, table, g = (jnp.float32(a) for a in (x.h, x.delta, x.tables[0], x.g))
    plan = row_plan(ids, num_rows=23)
    assert plan.unique_U.min() == 0
    options = {"plan": plan, "implementation": implementation, "eps": 1e-6}
    f = lambda rows: jtok(h, delta, table, ids, jnp.float32(x.scale), row_grads=rows, **options)
    out, pull = jax.vjp(f, jnp.zeros((plan.unique_U.size, 128)))
    rows = pull(g)[0]
    assert np.all(np.isfinite(out))
    assert np.all(np.isfinite(rows))
    nearest = jnp.clip(ids, 0, 22)
    clipped = jtok(h, delta, table, nearest, jnp.float32(x.scale), row_grads=None, **options)
    np.testing.assert_array_equal(out, clipped)
    stacked = jnp.stack([table, table + 1])
    arguments = h, delta, stacked, ids, jnp.float32(x.scale)
    last, over = (jtok(*arguments, layer=jnp.int32(layer), **options) for layer in (1, 7))
    np.testing.assert_array_equal(last, over)


def test_mixtures_without_a_depth_scale_and_rows_of_another_dtype_are_refused():
    x = inputs("repeated")
    stream = [jnp.float32(a) for a in (x.h, x.delta)]
    choice, weights = jnp.int32(x.choice), jnp.float32(x.weights)
    arguments = jnp.float32(x.tables), jnp.int32(x.ids), choice, weights, jnp.float32(x.scale)
    with pytest.raises(ValueError, match="depth_scale is None; expected a number"):
        jtok_m(*stream, *arguments, depth_scale=None, eps=1.0)
    rows = jnp.bfloat16(x.h)
    with pytest.raises(ValueError, match=r"e is bfloat16 .*; expected float32"):
        norm_add(*stream, rows, jnp.float32(x.scale), depth_scale=0.1, eps=1.0)


@pytest.mark.parametrize("make", [adamw, lazy_adam])
def test_step_and_rate_may_be_numbers(make):
    optimizer = make(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    table, unique = jnp.ones((7, 128)), jnp.int32([1, 4, 7])
    run_with = lambda **how: update_rows(
        optimizer, table, optimizer.init(table), unique, jnp.ones((3, 128)), **how
    )
    numbers = run_with(step=1, learning_rate=0.25)
    arrays = run_with(step=jnp.int32(1), learning_rate=jnp.float32(0.25))
    jax.tree.map(np.testing.assert_array_equal, numbers, arrays)


def test_updates_of_other_shapes_are_refused():
    table, unique = jnp.zeros((2, 23, 128)), jnp.int32([1, 4, 23])
    optimizer = rowwise_adagrad(eps=1e-8, weight_decay=0.0)
    state, good = optimizer.init(table), jnp.zeros((2, 3, 128))
    run_with = lambda table=table, state=state, unique=unique, grads=good: update_rows(
        optimizer, table, state, unique, grads,
        step=jnp.int32(1), learning_rate=jnp.float32(0.1),
    )  # fmt: skip
    run_with()
    for shape in ((3, 3, 128), (2, 6, 128), (3, 128), (1, 3, 128)):
        with pytest.raises(ValueError, match=r"row_grads is .*expected float32 \(2, 3, 128\)"):
            run_with(grads=jnp.zeros(shape))
    with pytest.raises(ValueError, match="row_grads is bfloat16"):
        run_with(grads=good.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="unique_U is float32"):
        run_with(unique=jnp.float32(unique))
    with pytest.raises(ValueError, match="table is int32"):
        run_with(table=table.astype(jnp.int32))
    with pytest.raises(ValueError, match=r"state is .*expected that of optimizer\.init"):
        run_with(state=lazy_adam(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0).init(table))


@pytest.mark.skipif(not KERNELS, reason="the GPU kernels need a newer JAX")
@pytest.mark.parametrize("checked", [False, True])
def test_a_kernel_is_chosen_inside_shard_map_where_it_can_be_traced(checked, monkeypatch):
    device = choosing._Device("gpu", "NVIDIA H100 80GB HBM3", 8)
    monkeypatch.setattr(choosing, "_device", lambda: device)
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("x",))
    chosen = []

    def local(ids):
        chosen.append(modulate._implementation(None, jnp.ones((7, 256)), None, ids))
        return ids

    run_local = jax.shard_map(
        local, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=checked
    )
    jax.eval_shape(run_local, jax.ShapeDtypeStruct((4,), jnp.int32))
    assert chosen == ["xla" if checked else "mosaic_gpu"]
    assert modulate._implementation(None, jnp.ones((7, 256)), None) == "xla"


@pytest.mark.skipif(not KERNELS, reason="the GPU kernels need a newer JAX")
def test_a_kernel_that_cannot_be_traced_in_shard_map_says_what_to_do():
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("x",))
    table, scale = jnp.ones((7, 128)), jnp.ones(128)
    ids, h = jax.ShapeDtypeStruct((4,), jnp.int32), jax.ShapeDtypeStruct((4, 128), jnp.float32)

    def loss(h, ids, *, checked):
        local = lambda h, ids: jtok(
            h, h, table, ids, scale, eps=1.0, implementation="mosaic_gpu:interpret"
        )
        options = {"mesh": mesh, "in_specs": P("x"), "out_specs": P("x"), "check_vma": checked}
        return jnp.sum(jax.shard_map(local, **options)(h, ids))

    jax.eval_shape(jax.grad(functools.partial(loss, checked=False)), h, ids)
    with pytest.raises(ValueError, match="pass it check_vma=False"):
        jax.eval_shape(jax.grad(functools.partial(loss, checked=True)), h, ids)


@pytest.mark.parametrize(
    ("platform", "kind", "count", "expected"),
    [
        ("gpu", "NVIDIA A100-SXM4-80GB", 1, "xla"),
        ("gpu", "AMD Instinct MI300X", 1, "xla"),
        ("gpu", "NVIDIA H100 80GB HBM3", 1, "mosaic_gpu"),
        ("gpu", "NVIDIA H100 80GB HBM3", 8, "xla"),
        ("tpu", "TPU v5 lite", 1, "mosaic_tpu"),
        ("tpu", "TPU v5 lite", 4, "xla"),
        ("cpu", "cpu", 1, "xla"),
    ],
)
def test_what_is_chosen_for_a_device_runs_there(platform, kind, count, expected, monkeypatch):
    device = choosing._Device(platform, kind, count)
    monkeypatch.setattr(choosing, "_device", lambda: device)
    if expected == "mosaic_gpu" and jax.version.__version_info__ < choosing.FIRST_JAX:
        expected = "xla"
    tables = {"dim": 256, "dtype": jnp.dtype("float32")}
    name = choose(None, **tables).name
    assert name == expected
    assert choose(name, **tables).name == name  # as a model asks for what was chosen


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("mosaic_tpu:interpret", {"dim": 200, "dtype": "float32"}, "multiples of 128"),
        ("mosaic_tpu:interpret", {"dim": 256, "dtype": "bfloat16"}, "see pack_rows"),
        ("mosaic_tpu:interpret", {"dim": 128, "dtype": "uint32"}, "multiples of 256"),
        (
            "mosaic_tpu:interpret",
            {"dim": 8192, "dtype": "float32", "num_tables": 5, "top_k": 2},
            "a block of 2 rows of 8192 entries a token exceeds vector memory",
        ),
    ],
)
def test_tables_a_kernel_cannot_take_are_refused(name, shape, message):
    with pytest.raises(ValueError, match=message):
        choose(name, **shape | {"dtype": jnp.dtype(shape["dtype"])})


@pytest.mark.skipif("mosaic_gpu:interpret" not in IMPLEMENTATIONS, reason="needs JAX 0.11.1")
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"dim": 8192}, "multiples of 128 up to 4096"),
        ({"dim": 200}, "multiples of 128 up to 4096"),
        ({"dim": 2048, "num_tables": 64}, "64 sums of 2048 entries exceed"),
        ({"dim": 4096, "num_tables": 8, "top_k": 3}, "3 rows of 4096 entries a token exceed"),
    ],
)
def test_tables_the_gpu_kernels_cannot_take_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        choose("mosaic_gpu:interpret", dtype=jnp.dtype("float32"), **shape)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b1": 1.0}, "b1 is 1.0; expected at least 0 and less than 1"),
        ({"b2": -0.1}, "b2 is -0.1"),
        ({"eps": 0.0}, "expected > 0"),
        ({"weight_decay": -1.0}, "expected > 0 and >= 0"),
    ],
)
def test_optimizers_refuse_what_cannot_work(options, message):
    with pytest.raises(ValueError, match=message):
        lazy_adam(**{"b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.0} | options)


def test_adagrad_needs_an_eps():
    with pytest.raises(ValueError, match="expected > 0"):
        rowwise_adagrad(eps=0.0, weight_decay=0.0)
