# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Tables on two to eight simulated devices against one; run by test_layouts.py, or by hand:

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest tests/eight_devices.py

With NIGHTLY=1 (make nightly) every layout on every number of devices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from jax.sharding import Mesh
from jtok_kernels import lazy_adam, update_rows
from pythons import OLD
from small import JTOK, JTOK_M, random_ids, random_params, with_every_table
from test_config import changed

from jtok_jax.config import Config, MeshConfig, OptimizerConfig, TableOptimizerConfig, TrainConfig
from jtok_jax.data.loader import Batch
from jtok_jax.inference.generator import generate
from jtok_jax.inference.sampling import Sampling
from jtok_jax.mesh import (
    AUTO,
    AXES,
    RULES,
    make_mesh,
    mesh_shape,
    num_shards,
    put_batch,
    sharding,
)
from jtok_jax.model import moe
from jtok_jax.model.attention import SIMULATED, causal
from jtok_jax.model.loss import cross_entropy
from jtok_jax.model.params import bind
from jtok_jax.model.placement import over_all, parameter_sharding, table_layouts
from jtok_jax.model_config import ModelConfig, MoeConfig
from jtok_jax.training import step
from jtok_jax.training.checkpoint import Checkpoints
from jtok_jax.training.optimizer import make_optimizer
from jtok_jax.training.resume import claim_workdir
from jtok_jax.training.state import abstract_state, init_state, state_shardings
from jtok_jax.training.steps import Steps

replace = dataclasses.replace
DENSE = ModelConfig(
    vocab_size=30, vocab_multiple=8, model_dim=16, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=6, ffn_dim=24, init_std=0.3, compute_dtype="float32",
)  # fmt: skip
EXPERTS = MoeConfig(num_experts=4, top_k=2, expert_dim=8, shared_dim=8, router_init_std=0.5)
MODELS = {
    "jtok": replace(DENSE, jtok=JTOK),
    "jtok_m": replace(DENSE, jtok=replace(JTOK_M, num_tables=4)),
}
LAYOUTS = {
    "columns": MeshConfig(fsdp=8, table_columns="fsdp"),
    "columns of two axes": MeshConfig(fsdp=4, table_columns="fsdp,data"),
    "columns, two copies": MeshConfig(fsdp=4, table_columns="fsdp"),
    "columns of two, four copies": MeshConfig(fsdp=4, table_columns="data"),
    "rows": MeshConfig(fsdp=4, table_columns="", table_rows="fsdp,data"),
    "rows and columns": MeshConfig(fsdp=4, table_columns="fsdp", table_rows="data"),
    "copies": MeshConfig(fsdp=4, table_columns=""),
    "columns over a tensor axis": MeshConfig(fsdp=2, tensor=2, table_columns="tensor,fsdp"),
    "tables": MeshConfig(fsdp=4, table_columns="data", table_experts="fsdp"),
}
FEWER = {
    "columns": MeshConfig(fsdp=2, table_columns="fsdp"),
    "tables": MeshConfig(fsdp=2, table_columns="", table_experts="fsdp"),
    "rows": MeshConfig(data=2, fsdp=1, table_columns="", table_rows="data"),
    "columns of four": MeshConfig(fsdp=2, tensor=2, table_columns="tensor,fsdp"),
    "rows and tables of four": MeshConfig(
        fsdp=2, table_columns="", table_experts="fsdp", table_rows="data"
    ),
    "rows and columns of four": MeshConfig(fsdp=2, table_columns="fsdp", table_rows="data"),
    "copies on four": MeshConfig(fsdp=2, table_columns=""),
}
BATCH = (16, 8)


def run_config(kind: str, layout: MeshConfig, **train) -> Config:
    train = {"batch_size": BATCH[0], "seq_len": BATCH[1], "max_unique_ids": 30} | train
    return Config(model=MODELS[kind], mesh=layout, train=TrainConfig(**train))


def first_devices(config: MeshConfig, count: int) -> Mesh:
    shape = mesh_shape(config, count)
    return Mesh(np.array(jax.devices()[:count]).reshape(shape), AXES, axis_types=AUTO)


@functools.cache
def alone(config: Config):
    """`trajectory` of the run on one device."""
    return trajectory(config, first_devices(config.mesh, 1))


def trajectory(config: Config, mesh: Mesh, steps: int = 3):
    """(losses, gradient norms, (batch hash, different ids), last state) of a few steps."""
    optimizer = make_optimizer(config)
    state = init_state(config, optimizer, mesh)
    run = step.jit_train_step(config, optimizer, mesh)
    losses, norms, batches = [], [], []
    for number in range(steps):
        ids = np.asarray(random_ids(config.model, *BATCH, seed=number)) % 29
        batch = put_batch(mesh, ids)
        state, metrics = run(state, batch, batch)
        losses.append(float(metrics.loss))
        norms.append(float(metrics.grad_norm))
        batches.append((metrics.batch_hash.tolist(), int(metrics.unique_ids)))
    return losses, norms, batches, jax.device_get(state)


def trajectory_from_host(config: Config, mesh: Mesh, steps: int = 3):
    """Train as `trajectory` does, with tables in host memory; these are returned by name."""
    optimizer, losses, norms = make_optimizer(config), [], []
    state, run = init_state(config, optimizer, mesh), Steps(config, optimizer, mesh)
    run.initialise_tables()
    ids = (np.asarray(random_ids(config.model, *BATCH, seed=one)) % 29 for one in range(steps))
    for batch, rows in run.read_ahead((Batch(one, one) for one in ids), first_step=1):
        state, metrics = run.train(state, (*[put_batch(mesh, x) for x in batch], *rows))
        losses.append(float(metrics.loss))
        norms.append(float(metrics.grad_norm))
    run.close()
    return losses, norms, run.tables.by_name()


@pytest.mark.skipif(OLD, reason="compiled here as for no user; make test-latest has it")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "layout", drawn(["columns, two copies", "tables", "columns over a tensor axis"], 1)
)
def test_tables_in_host_memory_train_as_those_on_the_devices(layout, streaming):
    fields = {"optimizer.clip_norm": 0.0, "model.remat": "dots"}
    config = changed(run_config("jtok_m", LAYOUTS[layout]), fields)
    mesh = make_mesh(config.mesh)
    losses, norms, _, state = trajectory(config, mesh)
    host = {"mesh.table_streaming": streaming, "mesh.table_prefetch": int(not streaming)}
    found = trajectory_from_host(changed(config, host | {"mesh.table_memory": "host"}), mesh)
    assert losses == found[0]
    np.testing.assert_allclose(norms, found[1], rtol=1e-6 if streaming else 0)
    stacks = {"tables": state.params["tables"]} | state.opt_state["tables"]
    for name, value in found[2].items():
        leaf = name.rpartition("/")[2]
        np.testing.assert_array_equal(*value.regions.values(), stacks[leaf], name)


def check_trains_as_alone(config: Config, devices: int = 8) -> None:
    losses, norms, batches, state = trajectory(config, first_devices(config.mesh, devices))
    expected = alone(replace(config, mesh=MeshConfig()))
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
    np.testing.assert_allclose(norms, expected[1], rtol=1e-5)
    assert batches == expected[2]
    for name, value in expected[3].params.items():
        np.testing.assert_allclose(state.params[name], value, atol=2e-4, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "layout"),
    drawn([(k, name) for k in MODELS for name in LAYOUTS if k == "jtok_m" or name != "tables"], 3),
)
def test_every_layout_trains_as_one_device(kind, layout):
    """JTok has one table a layer: none to split."""
    check_trains_as_alone(run_config(kind, LAYOUTS[layout]))


@pytest.mark.parametrize(("kind", "layout"), drawn([
    (kind, name) for kind in MODELS for name, layout in FEWER.items()
    if kind == "jtok_m" or not layout.table_experts
], 1))  # fmt: skip
def test_fewer_devices_train_as_one(kind, layout):
    check_trains_as_alone(run_config(kind, FEWER[layout]), devices=4 if "four" in layout else 2)


@pytest.mark.parametrize(
    "mesh", drawn([{"fsdp": 8}, {"expert": 4}, {"expert": 2, "tensor": 2}], 1), ids=str
)
def test_experts_on_several_devices_train_as_on_one(mesh):
    """With tables beside them, on the same axes."""
    model = replace(MODELS["jtok"], moe=EXPERTS)
    layout = MeshConfig(**mesh, table_columns=",".join(mesh))
    check_trains_as_alone(replace(run_config("jtok", layout), model=model))


@pytest.mark.parametrize(("changes", "of_model"), drawn([
    ({"layers": "0,2"}, {}), ({"sharing": "shared", "router_input": "post_attention"}, {}),
    ({"table_dtype": "bfloat16"}, {"head": "tied", "loss_chunk": 12}),
], 1), ids=str)  # fmt: skip
def test_kinds_of_tables_train_as_on_one_device(changes, of_model):
    """Layers without tables, one set for all, rows sent for after attention, rounded rows."""
    config = run_config("jtok_m", LAYOUTS["rows and columns"])
    model = replace(config.model, jtok=replace(config.model.jtok, **changes), **of_model)
    check_trains_as_alone(replace(config, model=model))


@pytest.mark.parametrize(("layout", "kind", "accumulation"), drawn([
    ({"fsdp": 4, "tensor": 2}, "adamw", 1),  # copies: no width is a multiple of 128
    ({"fsdp": 4, "table_columns": "fsdp", "table_rows": "data"}, "lazy_adam", 2),
    ({"fsdp": 4, "table_columns": "fsdp"}, "rowwise_adam", 1),
], 1))  # fmt: skip
def test_every_table_trains_as_on_one_device(layout, kind, accumulation):
    """All arms at once beside JTok-M: by token and by n-gram, at the input and in layers."""
    config = run_config("jtok_m", MeshConfig(**layout), grad_accumulation=accumulation)
    optimizer = OptimizerConfig(learning_rate=1e-2, tables=TableOptimizerConfig(kind=kind))
    model = with_every_table(config.model)
    check_trains_as_alone(replace(config, model=model, optimizer=optimizer))


@pytest.mark.parametrize(("chunk", "scale"), [(0, 1), (12, 30)])  # of a device's 32 and 16 tokens
@pytest.mark.parametrize("mesh", [{"fsdp": 2, "tensor": 2}, {"fsdp": 4, "expert": 2}], ids=str)
def test_loss_and_its_gradients_are_those_of_one_device(mesh, chunk, scale):
    """Columns of the head are split, the last two of them padding; weights differ by device.

    Of logits up to hundreds an exponential alone would be infinite.
    """
    mesh = make_mesh(MeshConfig(**mesh))
    rng = np.random.default_rng(0)
    hidden = np.float32(scale * rng.standard_normal((*BATCH, 16)))
    head = rng.standard_normal((16, 32))
    targets, weights = rng.integers(0, 30, BATCH), np.float32(rng.integers(0, 3, BATCH))
    targets[:2] = [[0, 15, 16, 29] * 2] * 2  # at either end of a part

    def run(mesh, *arrays):
        def loss(hidden, head, targets, weights):
            of = {"vocab_size": 30, "chunk": chunk, "z_loss": 0.1, "mesh": mesh}
            return cross_entropy(hidden, head, targets, weights, **of)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*arrays)

    by_letters = functools.partial(sharding, mesh, RULES)
    put = jax.device_put(np.float32(head), by_letters("DV", head.shape))
    found = run(
        mesh, put_batch(mesh, hidden), put, *(put_batch(mesh, x) for x in (targets, weights))
    )
    expected = run(None, hidden, np.float32(head), targets, weights)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=scale * 1e-6)


def test_no_token_is_dropped_where_all_choose_one_expert():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.float32(rng.standard_normal(shape))
    x, matrices = draw(16, 8, 16), (draw(4, 16, 8), draw(4, 16, 8), draw(4, 8, 16))
    choice = jnp.zeros((16, 8, 2), jnp.int32).at[..., 1].set(3)
    weights = jnp.float32(rng.random((16, 8, 2)))
    flat = lambda value: value.reshape(-1, value.shape[-1])
    expected = moe.experts(flat(x), flat(choice), flat(weights), *matrices)
    mesh = make_mesh(MeshConfig(expert=4))
    found = jax.jit(functools.partial(moe.sharded_experts, mesh))(x, choice, weights, *matrices)
    np.testing.assert_allclose(flat(found), expected, rtol=1e-5, atol=1e-5)


def of_one_mesh(kind: str) -> list[MeshConfig]:
    """Layouts that differ in nothing but where the tables lie; of JTok's one table without n_e."""
    same = [x for x in LAYOUTS.values() if (x.fsdp, x.tensor) == (4, 1)]
    return [x for x in same if kind == "jtok_m" or not x.table_experts]


@pytest.mark.parametrize("kind", MODELS)
def test_the_forward_pass_has_the_same_bits_in_every_layout_of_a_mesh(kind):

    def hidden(layout):
        config = run_config(kind, layout)
        mesh = make_mesh(config.mesh)
        params = init_state(config, make_optimizer(config), mesh).params
        ids = put_batch(mesh, np.asarray(random_ids(config.model, *BATCH)))
        parallel = step.parallel_reads(config, mesh)
        run = lambda params, ids: bind(config.model, params)(ids, parallel=parallel).hidden_BTD
        return np.asarray(jax.jit(run)(params, ids))

    layouts = of_one_mesh(kind)
    assert len(layouts) >= 6
    for layout in layouts[1:]:
        np.testing.assert_array_equal(hidden(layouts[0]), hidden(layout))


def test_mixtures_have_the_same_bits_in_every_layout():
    """Those of products that are rounded before they are summed."""
    rng = np.random.default_rng(0)
    tables = np.float32(rng.standard_normal((3, 4, 32, 16)))
    choice = np.int32(rng.integers(0, 4, (*BATCH, 2)))
    weights = np.float32(rng.random((*BATCH, 2)))
    for layout in of_one_mesh("jtok_m"):
        config = run_config("jtok_m", layout)
        mesh = make_mesh(config.mesh)
        ids = np.asarray(random_ids(config.model, *BATCH))
        exchange = step.parallel_reads(config, mesh).exchanges["tables"]

        def fetch(ids, choice, weights, exchange=exchange):
            of_group = exchange.gather_ids(ids)
            return exchange.fetch(tables, 1, ids, of_group, None, None, choice, weights)

        found = jax.jit(fetch)(*(put_batch(mesh, x) for x in (ids, choice, weights)))
        expected = np.sum(tables[1, choice, ids[..., None]] * weights[..., None], axis=-2)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("optimizer", drawn(["rowwise_adam", "rowwise_adagrad", "adamw"], 1))
def test_row_optimizers_take_whole_rows(optimizer):
    """Also with decay and two microbatches."""
    layout = MeshConfig(fsdp=4, table_columns="fsdp", table_rows="data")
    fields = {"optimizer.tables.kind": optimizer, "optimizer.tables.weight_decay": 0.1}
    config = changed(run_config("jtok_m", layout, grad_accumulation=2), fields)
    losses, _, _, state = trajectory(config, make_mesh(config.mesh))
    expected = alone(replace(config, mesh=MeshConfig()))
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
    for name, value in expected[3].opt_state["tables"].items():
        np.testing.assert_allclose(state.opt_state["tables"][name], value, 1e-3, 1e-5, err_msg=name)


def test_bfloat16_tables_are_rounded_alike_in_every_layout():
    """The same gradients of all rows, split otherwise, give the same bits."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.standard_normal((3, 4, 32, 16)), jnp.bfloat16)
    grads = jnp.float32(rng.standard_normal(table.shape))
    optimizer = lazy_adam(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)
    options = {
        "step": jnp.int32(1), "learning_rate": jnp.float32(0.01), "grad_scale": jnp.float32(1),
        "apply": True, "rounding_key": jax.random.key(3),
    }  # fmt: skip
    arguments = optimizer, table, optimizer.init(table)
    expected = update_rows(*arguments, jnp.arange(32), grads, **options)
    for layout in LAYOUTS.values():
        config = run_config("jtok_m", layout)
        mesh = make_mesh(config.mesh)
        update = step.parallel_reads(config, mesh).exchanges["tables"].update
        shards = num_shards(mesh, table_layouts(config, mesh)["tables"].rows)
        ids = jnp.tile(jnp.arange(32 // shards), shards)  # counted from each device's first row
        found = jax.jit(functools.partial(update, *arguments, ids, grads, **options))()
        jax.tree.map(np.testing.assert_array_equal, expected, found)


def test_a_state_restores_bit_for_bit_on_every_mesh(tmp_path):
    start = run_config("jtok_m", LAYOUTS["columns"])
    data = {"hash": "x"}
    optimizer = make_optimizer(start)
    saved = init_state(start, optimizer, make_mesh(start.mesh))
    claim_workdir(tmp_path, start)
    checkpoints = Checkpoints(tmp_path, start, data=data)
    checkpoints.save(saved, 1)
    checkpoints.wait()
    checkpoints.close()
    for layout in LAYOUTS.values():
        config = run_config("jtok_m", layout)
        mesh = make_mesh(config.mesh)
        again = Checkpoints(tmp_path, config, data=data)
        restored = again.restore(abstract_state(config, optimizer, mesh))
        again.close()
        jax.tree.map(np.testing.assert_array_equal, saved, restored)
        shardings = state_shardings(config, optimizer, mesh)
        assert jax.tree.map(lambda x: x.sharding, restored) == shardings


def test_more_unique_ids_than_there_is_room_for_make_the_step_void():
    config = run_config("jtok_m", LAYOUTS["rows and columns"], max_unique_ids=8)
    mesh = make_mesh(config.mesh)
    optimizer = make_optimizer(config)
    state = init_state(config, optimizer, mesh)
    ids = put_batch(mesh, np.asarray(random_ids(config.model, *BATCH)))
    _, metrics = jax.jit(step.make_train_step(config, optimizer, mesh))(state, ids, ids)
    assert not np.isfinite(metrics.grad_norm)


@pytest.mark.parametrize(("model", "layout"), [
    (MODELS["jtok"], LAYOUTS["columns"]),
    (replace(with_every_table(replace(MODELS["jtok_m"], moe=EXPERTS)),
             streams="bigram=2:40, trigram=3:48:2, frequent=3:119:frequent"), None),
])  # fmt: skip
def test_text_is_that_of_one_device(model, layout):
    """Prompts of other lengths and number than the devices."""
    layout = layout or over_all(model)
    assert layout.table_rows or layout.table_columns == "fsdp"
    config, params = Config(model=model, mesh=layout), random_params(model)
    place = parameter_sharding(config, make_mesh(layout))
    split = {name: jax.device_put(x, place(name, x.shape)) for name, x in params.items()}
    assert split["tables"].addressable_shards[0].data.size == params["tables"].size / 8
    options = {"tokens": 9, "sampling": Sampling(temperature=0.0), "seed": 0}
    write = lambda params: generate(model, params, [[3, 4, 5], [6], [7, 8, 9, 1, 2]], **options)
    np.testing.assert_array_equal(write(split), write(params))


def test_splash_attention_is_that_of_one_device():
    """Sequences and heads split; values and gradients, with segments."""
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.float32(rng.standard_normal((4, 256, heads, 8)))
    arrays, weights = (draw(4), draw(2), draw(2)), draw(4)
    segments = jnp.asarray(rng.integers(0, 2, (4, 256)).cumsum(axis=1) // 100, jnp.int32)

    def loss(mesh, *arrays):
        return jnp.sum(
            weights * causal(*arrays, kind=SIMULATED, segment_ids_BT=segments, mesh=mesh)
        )

    run = jax.jit(jax.value_and_grad(loss, (1, 2, 3)), static_argnums=0)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, run(make_mesh(MeshConfig(fsdp=2, tensor=2)), *arrays), run(None, *arrays))
