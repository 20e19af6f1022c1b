# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The largest model compiled for topologies it would run on; minutes each: make nightly."""

import pytest
from test_configs import load

from jtok_jax.planning.advice import changed
from jtok_jax.planning.compiled import lacks
from jtok_jax.planning.report import make_plan
from jtok_jax.planning.topology import parse_topology

SPLIT = {"mesh.fsdp": 16, "mesh.table_rows": "data"}
RUNS = {
    "v5p:4x4x4": SPLIT,
    "v6e:8x8": {
        "mesh.fsdp": 16, "mesh.expert": 4, "mesh.table_rows": "expert",
        "train.grad_accumulation": 4, "model.attention": "chunked",
        "optimizer.tables.kind": "rowwise_adam",
    },
    "h100:8x8": SPLIT,
}  # fmt: skip


@pytest.mark.parametrize("topology", RUNS)
def test_the_largest_model_fits_as_planned(topology):
    """17B-A2B with 43.6B table parameters; the compiler refuses what does not fit."""
    where = parse_topology(topology)
    if missing := lacks(where.chip.platform):
        pytest.skip(missing)
    plan = make_plan(changed(load("moe_17b_a2b"), RUNS[topology]), where, compile_too=True)
    assert plan["memory"]["fits"]
    assert plan["compiler"]["total"] < where.chip.memory
    assert plan["compiler"]["predicted_over_compiler"] == pytest.approx(1, abs=0.15)
