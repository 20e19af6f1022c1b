# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Tables in host memory: training, checkpoints and validation are those of tables on the device."""

import dataclasses
import errno
import itertools
import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pythons import OLD
from small import FREQUENT, KINDS, with_every_table
from test_config import changed
from test_data import run_config
from test_train_loop import check_same_run, records

from jtok_jax.config import Config, TrainConfig
from jtok_jax.errors import ConfigError, DataError, NonFiniteError, WorkdirError
from jtok_jax.mesh import make_mesh
from jtok_jax.model import host_memory
from jtok_jax.model_config import JtokConfig, ModelConfig
from jtok_jax.planning.compiled import compile_for_topology, compile_step, lacks, stand_in
from jtok_jax.planning.topology import parse_topology
from jtok_jax.store.pieces import read_pieces
from jtok_jax.training.checkpoint import Checkpoints
from jtok_jax.training.digest import digests, piece_digest
from jtok_jax.training.optimizer import make_optimizer
from jtok_jax.training.state import abstract_state
from jtok_jax.training.step import jit_train_step, step_arguments
from train import train

HOST = {"mesh.table_memory": "host"}
# Bits of a program depend on others it is compiled beside, unless code is made in one part.
pytestmark = pytest.mark.skipif(OLD, reason="compiled here as for no user; make test-latest has it")


@pytest.fixture(scope="module")
def config(corpus):
    """Eleven steps of a model with every kind of table; saves at 4, 8, 11."""
    jtok = dataclasses.replace(KINDS["dense-jtok_m"].jtok, table_init_std=0.02)
    model = with_every_table(dataclasses.replace(KINDS["dense-jtok_m"], jtok=jtok, vocab_size=300))
    start = dataclasses.replace(run_config(corpus, steps=11), model=model)
    fields = {"checkpoint.every": 4, "evaluation.every": 5, "train.log_every": 3}
    fields |= {"optimizer.tables.weight_decay": 0.1, "data.ngrams": f"{corpus}/{FREQUENT}"}
    return changed(start, fields)


def digests_of(workdir, step: int) -> dict[str, int]:
    """The digest of every array of a checkpoint."""
    path = workdir / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
    return json.loads(path.read_text())["custom_metadata"]["digests"]


def check_same(left, right, step: int):
    """Equal records, and equal arrays of a checkpoint, moments and clocks of rows among them."""
    check_same_run(left, right)
    expected = digests_of(left, step)
    assert "params/tables" in expected
    assert digests_of(right, step) == expected


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_training_is_that_of_tables_on_the_device(config, finished, tmp_path, prefetch):
    train(changed(config, HOST | {"mesh.table_prefetch": prefetch}), tmp_path)
    check_same(finished, tmp_path, 11)


@pytest.mark.parametrize("fields", [
    {"optimizer.tables.kind": "rowwise_adagrad", "train.grad_accumulation": 2},
    {"optimizer.tables.kind": "rowwise_adam", "model.jtok.table_dtype": "bfloat16"},
    {"model.jtok.kind": "jtok", "optimizer.frozen": "backbone", "train.max_unique_ids": 150},
], ids=["adagrad, accumulated", "rowwise adam, bfloat16", "frozen"])  # fmt: skip
def test_other_optimizers_and_dtypes(config, tmp_path, fields):
    start = changed(config, fields | {"train.steps": 5})
    train(start, tmp_path / "device")
    train(changed(start, HOST), tmp_path / "host")
    check_same(tmp_path / "device", tmp_path / "host", 5)


@pytest.mark.parametrize("there", [HOST, {}], ids=["to the host", "to the device"])
def test_a_run_goes_on_with_its_tables_elsewhere(config, finished, tmp_path, there):
    here = {} if there else HOST
    workdir = tmp_path / "run"
    if here:
        train(changed(config, here), workdir)
    else:
        shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "checkpoints" / "11")
    train(changed(config, there), workdir)
    check_same(finished, workdir, 11)


@pytest.fixture(scope="module")
def mapped(config, tmp_path_factory):
    """Workdir of the run with its tables in files."""
    workdir = tmp_path_factory.mktemp("mapped")
    train(changed(config, HOST | {"mesh.table_folder": str(workdir / "files")}), workdir / "run")
    return workdir / "run"


def test_rows_in_files_are_drawn_when_they_are_read(finished, mapped):
    """So a checkpoint has zeros for rows never read, and all else is the same.

    The other tables begin with zeros.
    """
    check_same_run(finished, mapped)
    expected, found = digests_of(finished, 11), digests_of(mapped, 11)
    others = [name for name in expected if found[name] != expected[name]]
    assert others == ["params/arms/scone/frequent", "params/tables"]


@pytest.mark.parametrize("there", [{}, HOST, HOST | {"mesh.table_folder": "files"}],
                         ids=["to the device", "to memory", "to files"])  # fmt: skip
def test_a_run_with_tables_in_files_goes_on_elsewhere(
    config, finished, mapped, tmp_path, monkeypatch, there
):
    monkeypatch.chdir(tmp_path)
    workdir = shutil.copytree(mapped, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "11")
    train(changed(config, there), workdir)
    if "mesh.table_folder" in there:
        check_same(mapped, workdir, 11)
    else:
        check_same(finished, workdir, 11)


def test_a_full_disk_under_the_files_ends_the_run_and_it_goes_on(
    config, finished, tmp_path, monkeypatch
):
    """Full once is enough: rows of that write are lost, whether later ones have room or not."""
    start = changed(config, HOST | {"mesh.table_folder": str(tmp_path / "files")})
    reserve, calls = os.posix_fallocate, itertools.count()

    def is_full_once(*arguments):
        if next(calls) == 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return reserve(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", is_full_once)
        with pytest.raises(WorkdirError, match=r"files has no room for more rows: .*No space left"):
            train(start, tmp_path / "run")
    train(start, tmp_path / "run")
    check_same_run(finished, tmp_path / "run")


def test_steps_that_are_not_finite_end_the_run(config, tmp_path):
    """A learning rate of 1e38 makes parameters infinite."""
    fields = {"optimizer.tables.weight_decay": 0.0, "optimizer.learning_rate": 1e38}
    start = changed(config, HOST | fields | {"train.max_bad_steps": 2})
    with pytest.raises(NonFiniteError):
        train(start, tmp_path)


def test_more_ids_than_there_is_room_for_end_the_run(config, tmp_path):
    start = changed(config, HOST | {"train.max_unique_ids": 9})
    with pytest.raises(
        DataError, match=r"Step 1 uses \d+ different ids, train.max_unique_ids is 9"
    ):
        train(start, tmp_path)


def test_what_cannot_lie_in_host_memory_is_refused(config, tmp_path):
    with pytest.raises(ConfigError, match="kind of jtok is adamw, whose rows have no clocks"):
        train(changed(config, HOST | {"optimizer.tables.kind": "adamw"}), tmp_path)
    with pytest.raises(ConfigError, match=r"mesh\.table_rows is 'fsdp', and tables are in host"):
        changed(config, HOST | {"mesh.table_rows": "fsdp"})
    with pytest.raises(ConfigError, match=r"mesh\.table_memory is 'disk'"):
        changed(config, {"mesh.table_memory": "disk"})
    with pytest.raises(ConfigError, match=r"mesh\.table_folder is 'files', and tables are on dev"):
        changed(config, {"mesh.table_folder": "files"})


STREAMED = HOST | {"mesh.table_streaming": True, "mesh.table_prefetch": 0, "model.remat": "dots"}


@pytest.mark.parametrize(("fields", "message"), [
    ({"mesh.table_memory": "device"}, "table_streaming is True, and tables are on devices"),
    ({"mesh.table_prefetch": 1}, "streamed are not read ahead. Set mesh.table_prefetch=0"),
    ({"model.remat": "none"}, "keeps the rows of all layers on the device"),
])  # fmt: skip
def test_streaming_that_cannot_be_is_refused(config, fields, message):
    with pytest.raises(ConfigError, match=message):
        changed(config, STREAMED | fields)


def test_a_device_without_such_memory_and_an_absent_gpu(config, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="for absent GPUs XLA knows no host memory"):
        compile_step(changed(config, STREAMED), parse_topology("h100:1x1"))
    monkeypatch.setattr(host_memory, "KIND", "paper")
    with pytest.raises(ConfigError, match="cpu has no memory of the kind paper, but "):
        train(changed(config, STREAMED), tmp_path)


@pytest.mark.parametrize("name", ["h100:1x1", "v5p:1x1x1"])
def test_no_device_holds_an_array_that_grows_with_a_table(name):
    """Compiled for real ones: a step's bytes are those of its rows, whatever a table's length."""
    memory = []
    for rows in (65_537, 1_048_573):  # sizes that nothing else has
        jtok = JtokConfig(kind="jtok_m", stream="pairs", table_dtype="bfloat16")
        model = ModelConfig(
            vocab_size=1000, model_dim=256, num_layers=2, num_heads=4, num_kv_heads=4, ffn_dim=512,
            streams=f"pairs=2:{rows}", jtok=jtok,
        )  # fmt: skip
        train_config = TrainConfig(batch_size=4, seq_len=256)
        config = changed(Config(model=model, train=train_config), HOST)
        topology = parse_topology(name)
        if missing := lacks(topology.chip.platform):
            pytest.skip(f"{missing} (make test-latest)")
        compiled = compile_for_topology(stand_in(config, topology.chip.platform), topology)
        assert not re.search(rf"\[[\d,]*\b{rows}\b", compiled.as_text())
        sizes = compiled.memory_analysis()
        memory.append(sizes.argument_size_in_bytes + sizes.temp_size_in_bytes)
    assert abs(memory[1] / memory[0] - 1) < 0.01


def test_rows_that_layers_move_in_turn_are_never_all_on_a_device():
    """Compiled for a TPU, in whose programs S(5) is the memory of the host."""
    if missing := lacks("tpu"):
        pytest.skip(f"{missing} (make test-latest)")
    model = ModelConfig(
        vocab_size=1000, model_dim=256, num_layers=3, num_heads=4, num_kv_heads=4, ffn_dim=512,
        remat="dots", jtok=JtokConfig(kind="jtok_m", table_dtype="bfloat16"),
    )  # fmt: skip
    train_config = TrainConfig(batch_size=8, seq_len=256, max_unique_ids=997, grad_accumulation=2)
    fields = STREAMED | {"mesh.fsdp": 2}
    for streaming in (False, True):
        start = Config(model=model, train=train_config)
        config = changed(start, fields | {"mesh.table_streaming": streaming})
        text = compile_for_topology(config, parse_topology("v5p:2x2x1")).as_text()
        stacks = re.findall(r"\[3,5,997,128\]\{[^}]*T\([^}]*\}", text)
        on_host = ["S(5)" in stack for stack in stacks]
        assert all(on_host) if streaming else not any(on_host)
        assert len(stacks) > 10


def moved_in(jaxpr, within=()):
    """Yield what a program moves to the device, and the kinds of loops and branches around it."""
    for one in jaxpr.eqns:
        if one.primitive.name == "device_put":
            for array in one.outvars:
                if array.aval.memory_space == host_memory.DEVICE:
                    yield array.aval, within
        for inner in jax.tree.leaves(one.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from moved_in(inner, (*within, one.primitive.name))


def test_layers_without_tables_move_no_rows():
    """In the forward and the backward pass the move is in the branch of layers that have tables."""
    jtok = JtokConfig(kind="jtok_m", layers="odd", table_dtype="bfloat16")
    model = dataclasses.replace(KINDS["dense-jtok_m"], jtok=jtok, num_layers=4, remat="dots")
    config = changed(Config(model=model), STREAMED | {"train.max_unique_ids": 50})
    mesh, optimizer = make_mesh(config.mesh), make_optimizer(config)
    arguments = step_arguments(config, optimizer, mesh, abstract_state(config, optimizer, mesh))
    step = jit_train_step(config, optimizer, mesh).trace(*arguments)
    rows = [within for array, within in moved_in(step.jaxpr.jaxpr) if array.dtype == jnp.bfloat16]
    *passes, update = sorted(rows, key=len, reverse=True)
    assert len(passes) == 2
    assert all("cond" in within for within in passes)
    assert "cond" not in update  # it is of the stack, which those layers are not in


def test_a_run_begins_with_tables_of_another(config, tmp_path):
    """One of them it has not: that begins with its first values."""
    fewer = ",".join(set(config.model.arms.chosen()) - {"value_embedding"})
    train(changed(config, {"model.arms.names": fewer, "train.steps": 2}), tmp_path / "first")
    start = changed(config, {"init_from": str(tmp_path / "first"), "train.steps": 4})
    train(start, tmp_path / "device")
    folder = {"mesh.table_folder": str(tmp_path / "files")}
    train(changed(start, HOST | folder), tmp_path / "host")
    check_same(tmp_path / "device", tmp_path / "host", 4)


def test_a_model_without_tables_and_one_that_begins_with_it(config, tmp_path):
    plain = {"model.jtok.kind": "none", "model.arms.names": "", "model.streams": ""}
    plain |= {"train.steps": 2, "data.ngrams": ""}
    train(changed(config, HOST | plain), tmp_path / "plain")
    start = changed(config, HOST | {"init_from": str(tmp_path / "plain"), "train.steps": 2})
    train(start, tmp_path / "run")
    assert "params/tables" in digests_of(tmp_path / "run", 2)


@pytest.mark.parametrize(("rows", "expected"), [(65_536, 8), (65_537, 9)])
def test_an_axis_of_any_length_is_split_into_pieces(tmp_path, rows, expected):
    """Rows without a fitting divisor too: one of 65,537 was as many files, then a single one."""
    table = np.zeros((4, rows, 128), np.float32)
    table[..., 0] = np.arange(rows)
    checkpoints = Checkpoints(tmp_path, Config(), data={})
    checkpoints.save_params({"tables": table})
    checkpoints.close()
    files = list(tmp_path.glob("checkpoints/0/state/params/tables/c/**/*"))
    assert len([path for path in files if path.is_file()]) == expected
    parts = list(read_pieces(tmp_path / "checkpoints" / "0", "params/tables"))
    total = sum(piece_digest(part, start, table.shape) for start, part in parts)
    assert total % (1 << 32) == digests({"": jnp.asarray(table)})[""]
    assert sum(part.size for _, part in parts) == table.size


@pytest.mark.parametrize("fields", [
    {
        "train.grad_accumulation": 2, "model.jtok.layers": "odd",
        "model.jtok.table_dtype": "bfloat16",
    },
    {"optimizer.tables.kind": "rowwise_adagrad", "model.jtok.sharing": "shared"},
], ids=["accumulated, bfloat16", "shared"])  # fmt: skip
def test_rows_that_layers_move_in_turn(config, tmp_path, fields):
    """The norm is summed in another order, so nothing is clipped; all else has the same bits."""
    steps = {"train.steps": 4, "optimizer.clip_norm": 0.0, "model.remat": "dots"}
    start = changed(config, fields | steps)
    train(start, tmp_path / "device")
    train(changed(start, STREAMED), tmp_path / "host")
    assert digests_of(tmp_path / "host", 4) == digests_of(tmp_path / "device", 4)
    for left, right in zip(records(tmp_path / "device"), records(tmp_path / "host"), strict=True):
        assert left.get("loss") == right.get("loss")
        assert left.get("val_loss") == right.get("val_loss")
        if "grad_norm" in left:
            np.testing.assert_allclose(left["grad_norm"], right["grad_norm"], rtol=1e-6)
