# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""TokenFormer and SCONE on eight devices, against one device.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest tests/eight_devices_maps.py
"""

from dataclasses import replace

import jax
import numpy as np
import pytest
from drawn import drawn
from eight_devices import check_trains_as_alone, first_devices, run_config
from small import random_ids, random_params
from test_config import changed

from jtok_jax.config import MeshConfig
from jtok_jax.grow import Growth, grow
from jtok_jax.mesh import put_batch
from jtok_jax.model.placement import parameter_sharding
from jtok_jax.training import step
from jtok_jax.training.checkpoint import Checkpoints
from jtok_jax.training.optimizer import make_optimizer
from jtok_jax.training.state import abstract_state, init_state
from jtok_jax.training.warm_start import begin_with

LAYOUTS = {
    "tensor": MeshConfig(fsdp=2, tensor=2),
    "fsdp": MeshConfig(fsdp=4, table_columns="fsdp"),
}
SLOTS = {"model.pattention.kind": "all", "model.pattention.slots": 12}
SLOTS |= {"model.pattention.ffn_slots": 20, "model.block_norm": "weightless_layer"}


@pytest.mark.parametrize(("kind", "layout"), drawn([
    ("all", "tensor"), ("all", "fsdp"), ("ffn", "tensor"), ("ffn", "fsdp"),
], 1))  # fmt: skip
def test_slots_over_devices_train_as_on_one(kind, layout):
    """Slots lie over the tensor axis; each has a count of its own, as after a growth."""
    fields = SLOTS | {"model.pattention.kind": kind, "init_from": "a run", "init_moments": True}
    check_trains_as_alone(changed(run_config("jtok", LAYOUTS[layout]), fields))


@pytest.mark.parametrize("layout", drawn(list(LAYOUTS), 1))
def test_a_grown_run_begins_alike_on_any_mesh(layout, tmp_path):
    """It has the moments of one trained on one device; what it saves is restored on any other mesh.

    Both to the bit.
    """
    small = changed(run_config("jtok", MeshConfig()), SLOTS)
    run, state, batch = begun(small)
    for _ in range(2):
        state, _ = run(state, batch, batch)
    save(tmp_path / "run", small, state)
    growth = Growth(slots=20)
    larger = grow(str(tmp_path / "run"), tmp_path / "grown", growth, moments=True).model
    config = replace(small, model=larger, init_from=f"{tmp_path}/grown", init_moments=True)
    expected = begin_with(config, first_devices(config.mesh, 1), begun(config)[1], None, print)
    config = replace(config, mesh=LAYOUTS[layout])
    mesh = first_devices(config.mesh, 8)
    run, first, batch = begun(config)
    found = begin_with(config, mesh, first, None, print)
    same = lambda left, right: jax.tree.map(
        np.testing.assert_array_equal, *jax.device_get((left, right))
    )
    same(found, expected)
    trained, _ = run(found, batch, batch)
    assert int(trained.step) == 1
    save(tmp_path / "again", config, trained)
    for there in (MeshConfig(), *LAYOUTS.values()):
        other = replace(config, mesh=there)
        mesh = first_devices(there, 1 if there == MeshConfig() else 8)
        checkpoints = Checkpoints(tmp_path / "again", other, data={})
        restored = checkpoints.restore(abstract_state(other, make_optimizer(other), mesh))
        same(restored, jax.device_get(trained))
        checkpoints.close()


def begun(config):
    """(step, first state, batch) of a run, on all devices of its mesh."""
    mesh, optimizer = (
        first_devices(config.mesh, 8 if config.mesh != MeshConfig() else 1),
        make_optimizer(config),
    )
    batch = put_batch(mesh, np.asarray(random_ids(config.model, 8, 16)))
    run = step.jit_train_step(config, optimizer, mesh)
    return run, init_state(config, optimizer, mesh), batch


def save(folder, config, state) -> None:
    checkpoints = Checkpoints(folder, config, data={})
    checkpoints.save(state, int(state.step))
    checkpoints.close()


@pytest.mark.parametrize(("kind", "layout"), drawn([
    ("model", "tensor"), ("model", "fsdp"), ("table", "tensor"), ("table", "fsdp"),
], 1))  # fmt: skip
def test_ngrams_over_devices_train_as_on_one(kind, layout, capfd):
    """A device makes the n-grams of its own sequences; the rows of a table are read as any.

    XLA gathers no activations of all devices, which it would warn of.
    """
    config = run_config("jtok", LAYOUTS[layout])
    fields = {
        "model.streams": "frequent=3:399:frequent", "model.arms.names": "scone",
        "model.arms.scone.kind": kind, "model.arms.scone.room": 4.0,
    }  # fmt: skip
    config = changed(config, fields)
    found = trajectory(config, first_devices(config.mesh, 8))
    alone = replace(config, mesh=MeshConfig())
    expected = trajectory(alone, first_devices(alone.mesh, 1))
    for metrics, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(metrics.loss, other.loss, rtol=1e-5)
        np.testing.assert_allclose(metrics.grad_norm, other.grad_norm, rtol=1e-5)
        for name in ("ngram_matched", "ngram_shortened") * (kind == "model"):
            assert metrics.ngrams[name] == other.ngrams[name]
    assert "rematerialization" not in capfd.readouterr().err
    if kind == "model":  # each device has nodes of its own
        assert found[0].ngrams["ngram_nodes"] > expected[0].ngrams["ngram_nodes"]
        assert expected[0].ngrams["ngram_matched"] > 0.1


def trajectory(config, mesh) -> list[step.StepMetrics]:
    optimizer = make_optimizer(config)
    state, place = init_state(config, optimizer, mesh), parameter_sharding(config, mesh)
    index = {
        name: value for name, value in random_params(config.model).items() if "/frequent/" in name
    }
    placed = {name: jax.device_put(x, place(name, x.shape)) for name, x in index.items()}
    state = state._replace(params=state.params | placed)
    run, found = step.jit_train_step(config, optimizer, mesh), []
    for number in range(3):
        batch = put_batch(mesh, np.asarray(random_ids(config.model, 8, 16, seed=number)) % 17)
        state, metrics = run(state, batch, batch)
        found.append(jax.device_get(metrics))
    return found
