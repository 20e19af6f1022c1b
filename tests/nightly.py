# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Real models compiled for their devices, and layouts of two processes; long: make nightly."""

import shutil

import pytest
from test_configs import load
from test_host_tables import digests_of
from test_hosts import ends, settings, start_two
from test_resume import records

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


MIXED = {"model.jtok.kind": "jtok_m", "optimizer.tables.kind": "rowwise_adam"}
LAYOUTS = {
    "columns apart": {"mesh.table_columns": "fsdp,data", "model.jtok.kind": "jtok"},
    "experts": MIXED | {
        "mesh.table_columns": "fsdp", "mesh.table_experts": "data", "model.jtok.num_tables": 4,
        "model.jtok.table_dtype": "bfloat16",
    },
    "copies": MIXED | {"mesh.fsdp": 1, "mesh.table_columns": "", "mesh.table_prefetch": 3},
    "bigrams": {
        "model.jtok.kind": "none", "model.arms.names": "ngram", "model.streams": "bigram=2:512:2",
        "mesh.table_prefetch": 0, "train.grad_accumulation": 1,
    },
    "streamed": MIXED | {
        "mesh.table_columns": "fsdp,data", "mesh.table_streaming": True, "mesh.table_prefetch": 0,
        "optimizer.clip_norm": 0.0, "model.remat": "dots",
    },
    "one table": {"model.jtok.kind": "jtok", "model.jtok.sharing": "shared", "mesh.fsdp": 4},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_host_tables_of_two_processes_are_those_of_devices(corpus, tmp_path, layout):
    """Losses, batches, and all arrays of a checkpoint; a run in files goes on from there."""
    steps = {"train.steps": 14, "evaluation.every": 14, "checkpoint.every": 7}
    run, host = steps | LAYOUTS[layout], {"mesh.table_memory": "host"}
    if run.pop("mesh.table_streaming", False):
        host["mesh.table_streaming"] = True
    files = host | {"mesh.table_folder": str(tmp_path / "files")}
    for place, fields in {"device": {}, "memory": host, "files": files}.items():
        if place == "files":  # from step 7 of the run in memory, with its dense checkpoint
            shutil.copytree(tmp_path / "memory", tmp_path / "files_run")
            shutil.rmtree(tmp_path / "files_run" / "checkpoints" / "14")
        workdir = tmp_path / ("files_run" if place == "files" else place)
        for code, _, err in ends(start_two(settings(workdir, corpus, run | fields))):
            assert code == 0, err
        # Streamed rows make another program, which rounds otherwise here.
        if layout != "streamed":
            assert digests_of(workdir, 14) == digests_of(tmp_path / "device", 14)
        for left, right in zip(records(workdir), records(tmp_path / "device"), strict=True):
            close = 3e-7 if layout == "streamed" else 0
            assert left.get("loss", 0) == pytest.approx(right.get("loss", 0), rel=close, abs=0)
            assert left.get("batch_hash") == right.get("batch_hash")
