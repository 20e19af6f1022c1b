# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Several devices, simulated in processes of their own, against one device."""

import os

import jax
import numpy as np
import pytest
from small import one_device
from test_resume import final_state, records, start

from jtok_jax import mesh
from jtok_jax.config import MeshConfig
from jtok_jax.errors import ConfigError
from jtok_jax.mesh import check_batch, make_mesh, sharding

FEW = {"train.steps": 12, "checkpoint.every": 6, "evaluation.every": 6}


def run(workdir, corpus, devices: int, overrides: dict, monkeypatch) -> str:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    monkeypatch.setenv("XLA_FLAGS", flags)
    process = start(workdir, corpus, FEW | overrides)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    return out


@pytest.mark.parametrize("kind", ["dense-jtok_m", "moe-jtok"])
def test_eight_devices_train_as_one(kind, corpus, tmp_path, monkeypatch):
    """Tables split by column over four devices; the run then goes on with one device alone."""
    model = {
        "dense-jtok_m": {},
        "moe-jtok": {"model.jtok.kind": "jtok", "model.moe.num_experts": 4},
    }
    settings = model[kind] | {"evaluation.batch_size": 8, "train.grad_accumulation": 1}
    run(tmp_path / "one", corpus, 1, settings, monkeypatch)
    half = settings | {"train.steps": 6, "schedule.steps": 12}
    out = run(tmp_path / "eight", corpus, 8, half | {"mesh.fsdp": 4}, monkeypatch)
    assert "mesh {'data': 2, 'fsdp': 4}" in out
    out = run(tmp_path / "eight", corpus, 1, settings | {"schedule.steps": 12}, monkeypatch)
    assert "resumed at step 6" in out
    for left, right in zip(records(tmp_path / "one"), records(tmp_path / "eight"), strict=True):
        assert left.get("batch_hash") == right.get("batch_hash")
        for key in ("loss", "val_loss"):
            if key in left:
                np.testing.assert_allclose(left[key], right[key], rtol=1e-4, err_msg=key)
    left, right = final_state(tmp_path / "one", 12), final_state(tmp_path / "eight", 12)
    np.testing.assert_allclose(left["params/tables"], right["params/tables"], atol=2e-3)


def test_axes_are_split_once_and_only_where_they_divide(monkeypatch):
    one = one_device()
    spec = sharding(one, "GMVD", (2, 3, 5, 8)).spec
    assert spec == jax.sharding.PartitionSpec(None, None, None, "fsdp")
    monkeypatch.setitem(mesh.MESH_AXES, "V", "fsdp")
    with pytest.raises(ValueError, match="use a mesh axis twice"):
        sharding(one, "VD", (5, 8))


def test_meshes_and_batches_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="1 x 3 but there are 1 devices"):
        make_mesh(MeshConfig(data=1, fsdp=3))

    class Three:
        size = 3

    with pytest.raises(ConfigError, match=r"train\.batch_size is 4; expected a multiple of the 3"):
        check_batch(Three(), "train.batch_size", 4)
