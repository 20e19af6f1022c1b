# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The plan: exact where it says so, refusals with numbers, changes that do fit; as a user runs it.

test_aot_mesh.py has its figures beside the compiler's.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from pythons import oldest
from small import DENSE, KINDS, one_device, small_config
from test_configs import load

from jtok_jax.arms_config import ArmsConfig, SconeConfig
from jtok_jax.config import MeshConfig
from jtok_jax.errors import ConfigError
from jtok_jax.mesh import abstract_mesh
from jtok_jax.model_config import PattentionConfig
from jtok_jax.planning import advice, compiled, traffic
from jtok_jax.planning.advice import changed
from jtok_jax.planning.memory import memory
from jtok_jax.planning.report import as_text, draw, make_plan
from jtok_jax.planning.topology import parse_topology
from jtok_jax.training.optimizer import make_optimizer
from jtok_jax.training.state import init_state

pytestmark = oldest
ROOT = pathlib.Path(__file__).parent.parent


PATTENTION = PattentionConfig(kind="all", slots=10, ffn_slots=22)
SCONE = ArmsConfig(names="scone", scone=SconeConfig(num_layers=2, room=1.0))
OTHERS = {
    "pattention": dataclasses.replace(DENSE, pattention=PATTENTION),
    "scone": dataclasses.replace(DENSE, arms=SCONE, streams="frequent=3:119:frequent"),
}


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS])
def test_bytes_of_the_state_are_exact(kind):
    config = small_config((KINDS | OTHERS)[kind])
    state = init_state(config, make_optimizer(config), one_device())
    found = memory(config, abstract_mesh(config.mesh, 1))
    assert found.state == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    tables = [part.size for part in found.parts if part.name == "tables"]
    assert tables == ([state.params["tables"].nbytes] if "tables" in state.params else [])


def test_every_device_more_holds_less():
    config = changed(load("dense_m"), {"mesh.fsdp": 4})
    more = changed(config, {"mesh.fsdp": 8})
    of = lambda c, n: {p.name: p.size for p in memory(c, abstract_mesh(c.mesh, n)).parts}
    four, eight = of(config, 4), of(more, 8)
    for name in ("backbone", "tables", "row optimizer", "AdamW moments"):
        assert eight[name] == pytest.approx(four[name] / 2, rel=0.01)  # but vectors, clocks
    assert eight["activations of all layers"] == four["activations of all layers"] / 2


def test_the_exchange_sends_one_vector_a_token_each_way():
    config = changed(load("moe_17b_a2b"), {"mesh.fsdp": 16, "mesh.data": 4})
    sent = {one.name: one for one in traffic.collectives(config, abstract_mesh(config.mesh, 64))}
    tokens = config.train.batch_size * config.train.seq_len / 64
    each_way = tokens * config.model.model_dim * 2 * config.model.num_layers
    assert sent["rows, columns of them"].size == int(2 * each_way * 15 / 16)
    assert sent["rows, columns of them"].axes == ("fsdp",)


def test_arms_keep_their_rows_and_share_the_ids():
    without = changed(load("dense_s"), {"model.jtok.kind": "none", "model.remat": "dots"})
    config = changed(without, {"model.arms.names": "deep_embed,value_embedding"})
    mesh, model = abstract_mesh(config.mesh, 8), config.model
    kept, before = (
        {part.name: part.size for part in memory(c, mesh).parts}["activations of all layers"]
        for c in (config, without)
    )
    tokens = config.train.batch_size * config.train.seq_len // 8
    value = model.num_kv_heads * model.head_size
    columns = value + 2 * model.model_dim  # rows of both, and the increment that one of them gates
    assert kept - before == 2 * tokens * columns * model.num_layers
    names = [one.name for one in traffic.collectives(config, mesh)]
    assert names.count("ids") == 1


def test_small_chunks_of_the_loss_take_time():
    """Each of a device's chunks reads the head twice, and reads and writes its gradient."""
    v5p = parse_topology("v5p:2x2x2")

    def seconds(chunk):
        fields = {"mesh.fsdp": 8, "model.loss_chunk": chunk, "train.grad_accumulation": 2}
        config = changed(load("dense_l"), fields)
        return traffic.step_time(config, abstract_mesh(config.mesh, 8), v5p).memory

    train, model = load("dense_l").train, load("dense_l").model
    tokens = train.batch_size * train.seq_len // 8  # of a device
    rate = traffic.MEMORY_SHARE * v5p.chip.memory_rate
    a_chunk = 12 * model.vocab_size * model.model_dim / rate
    assert seconds(512) - seconds(1024) == pytest.approx(tokens / 1024 * a_chunk)
    assert seconds(0) == seconds(tokens // 2)


def test_rates_follow_the_slowest_link():
    """GPUs of several hosts talk over the network, those of one over NVLink."""
    config = changed(load("dense_l"), {"mesh.fsdp": 8})
    one = make_plan(config, parse_topology("h100:1x8"))["estimate"]
    wide = changed(config, {"mesh.fsdp": 32})
    several = make_plan(wide, parse_topology("h100:4x8"))["estimate"]
    assert several["matmul_seconds"] == pytest.approx(one["matmul_seconds"] / 4)
    assert several["collective_seconds"] > one["collective_seconds"]
    assert one["mfu"][0] < one["mfu"][1] < 1


@pytest.mark.parametrize(("text", "says"), [
    ("v5p", "expected CHIP:GRID"), ("v9:2x2", "v5e, v5p, v6e, h100"), ("v5p:4x4", "3 sizes"),
    ("v5e:0x4", "at least 1"), ("h100:1x16", "16 are h100:2x8"), ("v6e:32x32", "a pod has 256"),
    ("v5p-64", r"v5p-64 \(cores, two a chip\) is v5p:2x4x4"), ("v5litepod-16", "is v5e:4x4"),
    ("v6e-256", "is v6e:16x16"), ("v5p-8", "is v5p:2x2x1"),
    ("v5p-7", "8 GPUs.$"), ("v5p-1", "8 GPUs.$"), ("v6e-0", "8 GPUs.$"),
])  # fmt: skip
def test_topologies_that_are_none(text, says):
    with pytest.raises(ConfigError, match=says):
        parse_topology(text)


@pytest.mark.parametrize(("change", "says"), [
    ({"mesh.fsdp": 3}, "tensor is 3, which does not divide the 8 devices"),
    ({"mesh.fsdp": 8, "train.batch_size": 12}, "multiple of the 8 devices"),
    ({"evaluation.batch_size": 12}, r"evaluation\.batch_size .* is 12; expected a multiple of"),
    ({"mesh.fsdp": 8, "mesh.table_experts": "fsdp"}, "no layer has several tables to choose from"),
])  # fmt: skip
def test_what_cannot_be_cut_is_refused_with_numbers(change, says):
    with pytest.raises(ConfigError, match=says):
        make_plan(changed(load("dense_l"), change), parse_topology("v5e:2x4"))


@pytest.mark.parametrize(
    ("name", "topology"), [("dense_l", "v5e:2x4"), ("moe_3b2_a500m", "v6e:4x4")]
)
def test_changes_that_would_fit_do(name, topology):
    config = changed(load(name), {"model.attention": "xla"})
    topology = parse_topology(topology)
    plan = make_plan(config, topology)
    assert not plan["memory"]["fits"]
    assert "DOES NOT FIT" in as_text(plan)
    assert len({str(change) for change in plan["changes_that_fit"]}) == 3
    for change in plan["changes_that_fit"]:
        assert make_plan(changed(config, change), topology)["memory"]["fits"], change


def test_nothing_fits_where_nothing_can():
    config = changed(load("moe_17b_a2b"), {"model.attention": "xla"})
    plan = make_plan(config, parse_topology("v5e:1x1"))
    assert plan["changes_that_fit"] == []
    assert plan["changes_tried"] == [
        "model.attention", "train.grad_accumulation", "model.remat", "optimizer.tables.kind",
        "mesh.table_memory",
    ]  # fmt: skip
    text = as_text(plan)
    assert "of model.attention, train.grad_accumulation, model.remat, optimizer.tables" in text
    assert "Else take more or larger chips" in text


def test_changes_are_those_of_the_tables_there_are():
    """Of any layer's, not of JTok's alone."""
    config = changed(load("dense_s"), {"model.jtok.kind": "none", "optimizer.tables.kind": "adamw"})
    found = advice.tried(config, devices=2)
    assert not {"optimizer.tables.kind", "model.arms.table_dtype", "mesh.table_rows"} & {*found}
    bigram = {"model.streams": "bigram=2:64", "model.arms.names": "ngram"}
    found = advice.tried(changed(config, bigram), devices=2)
    assert {"optimizer.tables.kind", "model.arms.table_dtype", "mesh.table_rows"} < {*found}
    assert "model.jtok.table_dtype" not in found


def test_a_step_that_the_compiler_refuses_does_not_fit(monkeypatch):
    def refuse(config, topology):
        raise compiled.RefusedError("43.75G exceeds available HBM (15.75G)")

    monkeypatch.setattr(compiled, "compile_step", refuse)
    plan = make_plan(load("quickstart"), parse_topology("v5e:1x1"), compile_too=True)
    assert not plan["memory"]["fits"]
    assert "DOES NOT FIT, says the compiler" in as_text(plan)
    assert "43.75G exceeds" in as_text(plan)
    json.dumps(plan, allow_nan=False)


def test_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install '.[plot]')")
    plan = make_plan(changed(load("dense_s"), {"mesh.fsdp": 8}), parse_topology("v6e:2x4"))
    draw(plan, tmp_path / "plan.svg")
    assert "<!-- AdamW moments -->" in (tmp_path / "plan.svg").read_text()


def run(*arguments: str):
    command = [sys.executable, "-m", "jtok_jax.plan", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_command():
    quickstart = "--config=configs/quickstart.py"
    done = run(quickstart, "--topology=v5e:1x1", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["memory"]["fits"]
    assert plan["memory"]["total"] == plan["memory"]["state"] + plan["memory"]["step"]
    missing, misspelt = run(quickstart), run(quickstart, "--topologie=v5e:1x1")
    assert (missing.returncode, misspelt.returncode) == (2, 2)
    assert "--topology is missing" in missing.stderr
    assert "topologie" in misspelt.stderr


def test_a_reader_that_leaves_is_no_traceback():
    command = [sys.executable, "-m", "jtok_jax.plan", "--config=configs/quickstart.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen([*command, "--topology=v5e:1x1"], **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == "Stopped: nothing reads the output any more.\n"
    assert process.returncode == 1


def test_host_tables_are_counted_by_hand():
    """A row has D entries and one number of its optimizer in every layer; a step has 30 rows."""
    fields = {"mesh.table_memory": "host", "train.max_unique_ids": 30, "model.jtok.kind": "jtok"}
    config = changed(load("dense_s"), fields | {"optimizer.tables.kind": "rowwise_adagrad"})
    topology = parse_topology("h100:1x1")
    found = traffic.host_rows(config, abstract_mesh(config.mesh, 1), topology)
    stack, rows, dim = config.model.tables_shape
    row = stack * (dim * jnp.dtype(config.model.jtok.table_dtype).itemsize + 4)
    assert found.each_way == 30 * row
    assert found.host == rows * row
    streamed = {"mesh.table_streaming": True, "mesh.table_prefetch": 0, "model.remat": "dots"}
    layers = traffic.host_rows(changed(config, streamed), abstract_mesh(config.mesh, 1), topology)
    table = stack * dim * jnp.dtype(config.model.jtok.table_dtype).itemsize
    grads = 4 * stack * dim
    assert layers.each_way == 30 * (row + 2 * table + 2 * grads)
    assert layers.host == rows * row + 2 * 30 * (row + grads)
    plan = make_plan(config, topology)
    seconds = plan["estimate"]["step_seconds"][0]
    assert plan["host_tables"]["rate"] == pytest.approx(30 * row / seconds)
    assert "of 64 GB/s at 70%: hidden\n  hidden from train.batch_size=" in as_text(plan)
    assert "is not stated" in as_text(make_plan(config, parse_topology("v5p:1x1x1")))
    assert "host_tables" not in make_plan(
        changed(config, {"mesh.table_memory": "device"}), topology
    )


@pytest.mark.parametrize(
    ("columns", "share"), [("", 1), ("fsdp", 1), ("data", 2), ("fsdp,data", 2)]
)
def test_a_host_of_several_holds_what_its_devices_have(columns, share):
    """Two hosts of eight; fsdp lies within a host, data across both."""
    fields = {"mesh.table_memory": "host", "mesh.fsdp": 8, "mesh.table_columns": columns}
    config = changed(load("dense_s"), fields | {"model.jtok.kind": "jtok", "train.batch_size": 64})
    found = traffic.host_rows(config, abstract_mesh(config.mesh, 16), parse_topology("h100:2x8"))
    alone = traffic.host_rows(
        changed(config, {"mesh.fsdp": 1, "mesh.table_columns": ""}),
        abstract_mesh(MeshConfig(), 1), parse_topology("h100:1x1"),
    )  # fmt: skip
    # What the optimizer keeps of a row as a whole is not split.
    assert found.host == pytest.approx(alone.host / share, rel=0.01)
    shards = {"": 1, "fsdp": 8, "data": 2, "fsdp,data": 16}[columns]
    assert found.of_device == pytest.approx(alone.host / shards, rel=0.02)


def test_tables_in_host_memory_are_a_change_that_fits():
    model = {"model.jtok.kind": "jtok_m", "model.remat": "full", "model.jtok.num_tables": 32}
    small = {"train.batch_size": 2, "train.max_unique_ids": 1000, "model.loss_chunk": 4096}
    config = changed(load("dense_m"), model | small | {"model.jtok.table_dtype": "bfloat16"})
    plan = make_plan(config, parse_topology("h100:1x1"))
    assert any("mesh.table_memory" in change for change in plan["changes_that_fit"])


def test_rows_streamed_by_layer_are_a_change_that_fits():
    fields = {"mesh.table_memory": "host", "mesh.table_prefetch": 0, "train.batch_size": 8}
    config = changed(load("dense_l"), fields | {"model.jtok.kind": "jtok_m"})
    streamed = {"mesh.table_streaming": True}
    sizes = {"rows of host tables, for steps": [], "gradients of rows": []}
    for change in ({}, {"model.jtok.layers": "0"}, {"model.jtok.sharing": "shared"}):
        found = memory(changed(config, streamed | change), abstract_mesh(config.mesh, 1))
        for part in found.parts:
            if part.name in sizes:
                sizes[part.name].append(part.size)
    for found in sizes.values():  # but for what is one number a row, which all layers have there
        assert len(found) == 3
        assert max(found) < 1.02 * min(found)
    plan = make_plan(config, parse_topology("v5p:1x1x1"))
    assert any("mesh.table_streaming" in change for change in plan["changes_that_fit"])
