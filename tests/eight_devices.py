# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Tables on eight simulated devices against one; run by test_layouts.py, or by hand:

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest tests/eight_devices.py
"""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from small import JTOK, JTOK_M, random_ids

from jtok_jax.config import (
    Config,
    MeshConfig,
    ModelConfig,
    TrainConfig,
)
from jtok_jax.mesh import AXES, make_mesh, put_batch
from jtok_jax.training import step
from jtok_jax.training.optimizer import make_optimizer
from jtok_jax.training.state import init_state, state_shardings

replace = dataclasses.replace
DENSE = ModelConfig(
    vocab_size=32, model_dim=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=6, ffn_dim=24,
    init_std=0.3, compute_dtype="float32",
)  # fmt: skip
MODELS = {
    "jtok": replace(DENSE, jtok=JTOK),
    "jtok_m": replace(DENSE, jtok=replace(JTOK_M, num_tables=4)),
}
LAYOUTS = {
    "columns": MeshConfig(fsdp=8, table_columns="fsdp"),
    "columns of two axes": MeshConfig(fsdp=4, table_columns="fsdp,data"),
    "columns, two copies": MeshConfig(fsdp=4, table_columns="fsdp"),
    "rows": MeshConfig(fsdp=4, table_columns="", table_rows="fsdp,data"),
    "rows and columns": MeshConfig(fsdp=4, table_columns="fsdp", table_rows="data"),
    "copies": MeshConfig(fsdp=4, table_columns=""),
    "columns over a tensor axis": MeshConfig(fsdp=2, tensor=2, table_columns="tensor,fsdp"),
    "tables": MeshConfig(fsdp=4, table_columns="data", table_experts="fsdp"),
}
BATCH = (16, 8)


def run_config(kind: str, layout: MeshConfig, **train) -> Config:
    train = {"batch_size": BATCH[0], "seq_len": BATCH[1], "max_unique_ids": 30} | train
    return Config(model=MODELS[kind], mesh=layout, train=TrainConfig(**train))


def first_device() -> Mesh:
    devices = np.array(jax.devices()[:1]).reshape(1, 1, 1, 1)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 4)


def trajectory(config: Config, mesh: Mesh, steps: int = 3):
    """(losses, gradient norms, last parameters) of a few steps."""
    optimizer = make_optimizer(config)
    state = init_state(config, optimizer, mesh)
    shardings = state_shardings(config, optimizer, mesh)
    run = jax.jit(step.make_train_step(config, optimizer, mesh), out_shardings=(shardings, None))
    losses, norms = [], []
    for number in range(steps):
        ids = np.asarray(random_ids(config.model, *BATCH, seed=number)) % 29
        batch = put_batch(mesh, ids)
        state, metrics = run(state, batch, batch)
        losses.append(float(metrics.loss))
        norms.append(float(metrics.grad_norm))
    return losses, norms, jax.device_get(state)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", MODELS)
def test_every_layout_trains_as_one_device(kind, layout):
    if kind == "jtok" and LAYOUTS[layout].table_experts:
        pytest.skip("JTok has one table a layer")
    config = run_config(kind, LAYOUTS[layout])
    losses, norms, state = trajectory(config, make_mesh(config.mesh))
    alone = trajectory(config, first_device())
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    np.testing.assert_allclose(norms, alone[1], rtol=1e-5)
    for name, value in alone[2].params.items():
        np.testing.assert_allclose(state.params[name], value, atol=2e-4, err_msg=name)
