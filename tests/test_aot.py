# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The table path compiled for an H100 and for TPUs: no spilled registers, no copy of a table.

Nothing is executed: this proves neither speed nor numbers. Skipped, with the reason, where the
compile-only plugins are not installed.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from aot import compile_for, copies_of, h100, spills, tpu
from jtok_kernels import (
    jtok,
    jtok_m,
    lazy_adam,
    row_plan,
    rowwise_adagrad,
    rowwise_adam,
    update_rows,
)
from jtok_kernels.mosaic_gpu_block import MAX_HELD, resident

from jtok_jax.config import Config, TrainConfig
from jtok_jax.model.moe import experts
from jtok_jax.model_config import JtokConfig, ModelConfig
from jtok_jax.training.optimizer import make_optimizer
from jtok_jax.training.state import abstract_state
from jtok_jax.training.step import make_train_step

TPUS = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]
LAYERS, TOKENS, ROWS, TABLES, TOP_K = 3, 512, 65536, 5, 2  # V so large that a table stands out
UNIQUE = 256  # rows of an update
shape = jax.ShapeDtypeStruct


def operation(kind: str, dim: int, dtype: str, implementation: str):
    """(forward and backward of a scan over layers, its arguments); "uint32": a packed table."""
    several = () if kind == "jtok" else (TABLES,)
    packed = dtype == "uint32"
    stack = shape((LAYERS, *several, ROWS, dim // 2 if packed else dim), dtype)
    dtype = "bfloat16" if packed else dtype
    stream, ids = shape((TOKENS, dim), dtype), shape((TOKENS,), jnp.int32)
    choice, weights = shape((TOKENS, TOP_K), jnp.int32), shape((TOKENS, TOP_K), jnp.float32)

    def gradients(h, delta, stack, ids, choice, weights, scale):
        plan = row_plan(ids, num_rows=ROWS)
        zeros = jnp.zeros((LAYERS, *several, plan.unique_U.size, dim))
        options = {"plan": plan, "eps": 1e-6, "implementation": implementation}

        def loss(h, delta, weights, scale, zeros):
            def body(h, layer):
                index, rows = layer
                mine = options | {"layer": index, "row_grads": rows}
                if kind == "jtok":
                    return jtok(h, delta, stack, ids, scale, **mine), None
                mine["depth_scale"] = 0.2
                return jtok_m(h, delta, stack, ids, choice, weights, scale, **mine), None

            out, _ = jax.lax.scan(body, h, (jnp.arange(LAYERS), zeros))
            return jnp.sum(jnp.square(out.astype(jnp.float32)))

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3, 4))(h, delta, weights, scale, zeros)

    arguments = stream, stream, stack, ids, choice, weights, shape((dim,), jnp.float32)
    return gradients, arguments


def check_memory(compiled, kind: str, dim: int) -> None:
    """No array of a table's size but the arguments and the row gradients that are asked for."""
    row_grads = LAYERS * (1 if kind == "jtok" else TABLES) * TOKENS * dim * 4
    memory = compiled.memory_analysis()
    # The scan's zeros and its stacked result; the stream, dm and their gradients of every layer.
    allowed = 2 * row_grads + (4 * LAYERS + 8) * TOKENS * dim * 4
    assert allowed < ROWS * dim * 2, "one table would hide among what is allowed"
    assert memory.temp_size_in_bytes < allowed, (memory.temp_size_in_bytes / allowed, allowed)
    several, text = () if kind == "jtok" else (TABLES,), compiled.as_text()
    for last in (dim, dim // 2):  # words
        for first in ((LAYERS, *several), several, (1, *several), (LAYERS * TABLES,)):
            found = copies_of(text, (*first, ROWS, last))
            assert not found, found


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dim", [384, 768, 1024, 2048, 4096])
@pytest.mark.parametrize("kind", ["jtok", "jtok_m"])
def test_h100_kernels_spill_nothing_and_hold_no_table(kind, dim, dtype, monkeypatch, capfd):
    mesh = h100()
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    function, arguments = operation(kind, dim, dtype, "mosaic_gpu")
    compiled = compile_for(mesh, function, *arguments)
    said = "".join(capfd.readouterr())
    # Forward, backward, merge; JTok-M merges sums alike for both dtypes, compiled once.
    found = spills(said, kernels=(3,) if kind == "jtok" else (2, 3))
    assert not found, found
    assert compiled.as_text().count('custom_call_target="mosaic_gpu') == 3
    check_memory(compiled, kind, dim)
    if dtype == "bfloat16" and dim in range(768, 2049):
        several = {} if kind == "jtok" else {"top_k": TOP_K, "num_tables": TABLES}
        used = max(int(count) for count in re.findall(r"Used (\d+) registers", said))
        assert resident(dim, **several) == 65536 // (128 * 8 * -(-used // 8)), "a wave of blocks"


@pytest.mark.parametrize(("top_k", "dim"), [(2, 4096), (9, 2048)])
def test_the_most_rows_a_token_may_mix_spill_nothing(top_k, dim, monkeypatch, capfd):
    assert (top_k + 5) * dim == MAX_HELD
    mesh = h100()
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setitem(globals(), "TABLES", 9)
    monkeypatch.setitem(globals(), "TOP_K", top_k)
    function, arguments = operation("jtok_m", dim, "bfloat16", "mosaic_gpu")
    compile_for(mesh, function, *arguments)
    found = spills("".join(capfd.readouterr()), kernels=(3,))
    assert not found, found


@pytest.mark.parametrize("kind", ["jtok", "jtok_m"])
@pytest.mark.parametrize(("target", "dim", "dtype"), [
    ("v5e:2x2", 768, "uint32"), ("v5e:2x2", 2048, "float32"), ("v5p:2x2x1", 2048, "uint32"),
    ("v6e:2x2", 768, "float32"), ("v6e:2x2", 1024, "uint32"),
])  # fmt: skip
def test_tpu_kernels_hold_no_table(target, dim, dtype, kind):
    function, arguments = operation(kind, dim, dtype, "mosaic_tpu")
    compiled = compile_for(tpu(target), function, *arguments)
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 2  # either way
    cores = 2 if target.startswith("v5p") else 1
    # Every core adds up a gradient of the scale: where there are two, both have blocks.
    assert (f"f32[{cores},1,{dim}]" in text) == (kind == "jtok_m"), "partial sums of the scale"
    check_memory(compiled, kind, dim)


@pytest.mark.parametrize("kind", ["jtok", "jtok_m"])
@pytest.mark.parametrize(("target", "dim"), [("h100", 768), *((name, 2048) for name in TPUS)])
def test_plain_xla_holds_no_table(target, dim, kind):
    mesh = h100() if target == "h100" else tpu(target)
    function, arguments = operation(kind, dim, "bfloat16", "xla")
    check_memory(compile_for(mesh, function, *arguments), kind, dim)


def update(kind, dim: int, dtype: str, implementation: str):
    """(update of a stack of tables, its arguments)."""
    betas = {} if kind is rowwise_adagrad else {"b1": 0.9, "b2": 0.95}
    optimizer = kind(**betas, eps=1e-8, weight_decay=0.1)
    table = shape((LAYERS, TABLES, ROWS, dim // 2 if dtype == "uint32" else dim), dtype)
    state = jax.eval_shape(optimizer.init, table)

    def run(table, state, unique_U, grads, step, rate, scale, apply, key):
        options = {"step": step, "learning_rate": rate, "grad_scale": scale, "apply": apply}
        options |= {"rounding_key": key, "implementation": implementation}
        return update_rows(optimizer, table, state, unique_U, grads, **options)

    grads = shape((LAYERS, TABLES, UNIQUE, dim), jnp.float32)
    number = shape((), jnp.float32)
    scalars = shape((), jnp.int32), number, number, shape((), jnp.bool_)
    key = jax.eval_shape(lambda: jax.random.key(0, impl="rbg"))
    return run, (table, state, shape((UNIQUE,), jnp.int32), grads, *scalars, key)


def check_in_place(compiled, table, state) -> None:
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((table, state)))
    assert compiled.memory_analysis().alias_size_in_bytes >= held
    for size in (table.shape, (LAYERS * TABLES, *table.shape[2:])):
        assert not copies_of(compiled.as_text(), size)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dim", [768, 2048])
@pytest.mark.parametrize("kind", [lazy_adam, rowwise_adam, rowwise_adagrad])
def test_h100_update_kernels_spill_nothing_and_take_no_memory(kind, dim, dtype, monkeypatch, capfd):
    mesh = h100()
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    function, arguments = update(kind, dim, dtype, "mosaic_gpu")
    compiled = compile_for(mesh, function, *arguments, donate=(0, 1))
    found = spills("".join(capfd.readouterr()), kernels=(1,))
    assert not found, found
    check_in_place(compiled, *arguments[:2])
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 16


@pytest.mark.parametrize(("target", "kind", "dtype"), [
    ("h100", lazy_adam, "bfloat16"), ("h100", rowwise_adam, "float32"),
    ("v5e:2x2", lazy_adam, "bfloat16"), ("v5p:2x2x1", rowwise_adam, "float32"),
    ("v6e:2x2", lazy_adam, "float32"), ("v6e:2x2", lazy_adam, "uint32"),
])  # fmt: skip
def test_plain_updates_are_in_place(target, kind, dtype):
    mesh, dim = h100() if target == "h100" else tpu(target), 1024
    function, arguments = update(kind, dim, dtype, "xla")
    compiled = compile_for(mesh, function, *arguments, donate=(0, 1))
    check_in_place(compiled, *arguments[:2])
    memory, rows = compiled.memory_analysis(), TABLES * UNIQUE * dim * 4  # of one layer
    assert memory.temp_size_in_bytes < 8 * rows, memory.temp_size_in_bytes / rows
    assert memory.temp_size_in_bytes < ROWS * dim * 2  # one table


def training_step(kind: str, mesh, implementation="auto"):
    """(a training step on bfloat16 tables, its arguments)."""
    jtok_config = JtokConfig(kind=kind, table_dtype="bfloat16", implementation=implementation)
    model = ModelConfig(
        vocab_size=ROWS,
        model_dim=256,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        ffn_dim=512,
        jtok=jtok_config,
    )
    config = Config(model=model, train=TrainConfig(batch_size=4, seq_len=512))
    optimizer = make_optimizer(config)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state = abstract_state(config, optimizer, mesh)
        step = make_train_step(config, optimizer, mesh)
    ids = shape((4, 512), jnp.int32)
    return step, (state, ids, ids)


@pytest.mark.parametrize("kind", ["jtok", "jtok_m"])
def test_a_whole_training_step_compiles_for_an_h100_with_the_kernels(kind):
    mesh = h100()
    step, arguments = training_step(kind, mesh)
    compiled = compile_for(mesh, step, *arguments, donate=(0,))
    text = compiled.as_text()
    calls = text.count('custom_call_target="mosaic_gpu')
    assert calls == 4, f"forward, backward, merge and update are in the program: {calls}"
    assert "dynamic-slice-fusion" not in text, "XLA may run a kernel that is in one several times"
    assert not copies_of(text, arguments[0].params["tables"].shape)
    step, arguments = training_step(kind, mesh, "xla")
    text = compile_for(mesh, step, *arguments, only_lower=True).as_text()
    assert "mosaic_gpu" not in text


@pytest.mark.parametrize("kind", ["jtok", "jtok_m"])
def test_a_whole_training_step_compiles_for_a_tpu_with_tables_as_words(kind):
    mesh = tpu("v5e:2x2")
    step, arguments = training_step(kind, mesh)
    tables = arguments[0].params["tables"]
    assert (tables.dtype, tables.shape[-1]) == (jnp.uint32, 128)
    text = compile_for(mesh, step, *arguments, donate=(0,)).as_text()
    assert "tpu_custom_call" in text
    assert not copies_of(text, tables.shape)


def test_experts_on_an_h100_are_batched_matmuls():
    """No loop: each turn of one would wait for the host, where blocks are walked 143 of them."""
    tokens, dim, width, count, top_k = 32768, 384, 512, 15, 2
    matrices = [
        shape((count, *axes), jnp.float32) for axes in ((dim, width),) * 2 + ((width, dim),)
    ]
    routed = shape((tokens, top_k), jnp.int32), shape((tokens, top_k), jnp.float32)

    def loss(x, choice, weights, *matrices):
        return jnp.sum(jnp.square(experts(x, choice, weights, *matrices).astype(jnp.float32)))

    gradients = jax.grad(loss, argnums=(0, 2, 3, 4, 5))
    x = shape((tokens, dim), jnp.bfloat16)
    compiled = compile_for(h100(), gradients, x, *routed, *matrices)
    assert " while(" not in compiled.as_text()
    rows = tokens * top_k * (dim + width) * 2
    assert compiled.memory_analysis().temp_size_in_bytes < 7 * rows  # whatever the experts are
