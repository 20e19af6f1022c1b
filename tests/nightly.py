# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Real models compiled for the devices they would run on; minutes each: make nightly."""

import pytest
from test_configs import load

from jtok_jax.planning import compiled
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


@pytest.mark.parametrize("memory", ["84978434048", "150754820096"])  # an H100's, an H200's
@pytest.mark.parametrize("remat", ["dots", "full"])
@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("kind", ["jtok", "jtok_m"])
def test_a_layer_calls_each_kernel_once(kind, microbatches, remat, memory, monkeypatch):
    """At real shapes: short of memory, XLA clones what it may. Forward, backward, merge, update."""
    if missing := lacks("gpu"):
        pytest.skip(missing)
    h100 = compiled.H100.replace("84978434048", memory)
    monkeypatch.setattr(compiled, "H100", h100)
    compiled.absent_devices.cache_clear()
    shapes = {"train.seq_len": 2048, "train.batch_size": 16 * microbatches}
    config = changed(load("dense_l"), shapes | {
        "model.jtok.kind": kind, "model.jtok.table_dtype": "bfloat16", "model.remat": remat,
        "optimizer.tables.kind": "rowwise_adagrad", "train.max_unique_ids": 12000,
        "train.grad_accumulation": microbatches, "mesh.fsdp": 1,
    })  # fmt: skip
    text = compiled.compile_step(config, parse_topology("h100:1x1")).text
    compiled.absent_devices.cache_clear()
    assert text.count('custom_call_target="mosaic_gpu') == 4
