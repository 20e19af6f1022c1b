# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Pattention on eight devices, whose slots lie over the tensor axis, against one device.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest tests/eight_devices_maps.py
"""

import pytest
from drawn import drawn
from eight_devices import check_trains_as_alone, run_config
from test_config import changed

from jtok_jax.config import MeshConfig


@pytest.mark.parametrize("kind", drawn(["all", "ffn"], 1))
@pytest.mark.parametrize(
    "layout",
    [MeshConfig(fsdp=2, tensor=2), MeshConfig(fsdp=4, table_columns="fsdp")],
    ids=["tensor", "fsdp"],
)
def test_slots_over_devices_train_as_on_one(kind, layout):
    fields = {"model.pattention.kind": kind, "model.pattention.slots": 12}
    fields |= {"model.pattention.ffn_slots": 20, "model.block_norm": "weightless_layer"}
    check_trains_as_alone(changed(run_config("jtok", layout), fields))
