# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Tables in host memory: text, logits and losses of a run are those of tables on the device."""

import dataclasses
import errno
import itertools
import os
import shutil

import numpy as np
import pytest
from pythons import OLD
from small import FREQUENT, KINDS, with_every_table
from test_config import changed
from test_data import run_config

from jtok_jax.errors import CheckpointError, ConfigError, WorkdirError
from jtok_jax.evaluate import main as evaluate_main
from jtok_jax.generate import main as generate_main
from jtok_jax.loading import load
from jtok_jax.lock import locked
from train import train

# Bits of a program depend on others it is compiled beside, unless code is made in one part.
pytestmark = pytest.mark.skipif(OLD, reason="compiled here as for no user; make test-latest has it")
TEXT = "def main(argv):\n    return argv[0]\n"


@pytest.fixture(scope="module")
def config(corpus):
    """Three steps of a model with every kind of table."""
    jtok = dataclasses.replace(KINDS["dense-jtok_m"].jtok, table_init_std=0.1)
    model = with_every_table(dataclasses.replace(KINDS["dense-jtok_m"], jtok=jtok, vocab_size=300))
    start = dataclasses.replace(run_config(corpus, steps=3), model=model)
    fields = {"optimizer.learning_rate": 0.1, "checkpoint.every": 1}
    return changed(start, fields | {"data.ngrams": f"{corpus}/{FREQUENT}"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return where tables of the run are mapped."""
    return tmp_path_factory.mktemp("mapped") / "files"


@pytest.fixture(scope="module")
def runs(finished, folder):
    """The run with tables on the device, in host memory, and in files made and found."""
    places = {"table_memory": "device"}, {"table_memory": "host"}, *[{"table_folder": folder}] * 2
    return [load(finished, **place) for place in places]


def test_logits_are_equal_and_tables_are_not_on_the_device(runs):
    device, *others = runs
    for host in others:
        check_logits(device, host)


def check_logits(device, host):
    assert np.array_equal(device.logits(TEXT), host.logits(TEXT))
    assert device.token_losses(TEXT) == host.token_losses(TEXT)
    tables = {name for name in device.params if name == "tables" or name.startswith("arms/")}
    assert len(tables) > 2
    assert device.params.keys() - host.params.keys() == tables
    with pytest.raises(ConfigError, match="so no module holds them"):
        _ = host.model


def test_tables_that_only_a_device_can_train_are_read_all_the_same(config, tmp_path):
    train(changed(config, {"optimizer.tables.kind": "adamw", "train.steps": 1}), tmp_path)
    device, host = (load(tmp_path, table_memory=place) for place in ("device", "host"))
    assert np.array_equal(device.logits(TEXT), host.logits(TEXT))


def test_texts_of_prompts_of_several_lengths_are_equal(runs):
    prompts = [TEXT, "import os", "x"]
    expected, *found = [run.generate(prompts, tokens=30, seed=3) for run in runs]
    assert found == [expected] * 3
    assert expected != runs[1].generate(prompts, tokens=30, seed=4)


def test_files_of_another_checkpoint_are_refused(finished, folder, runs):
    wanted = r"holds the tables of step 3 of .*, and those of step 2 of .* are wanted"
    with pytest.raises(CheckpointError, match=wanted):
        load(finished, step=2, table_folder=folder)
    with pytest.raises(CheckpointError, match=r"and those of step 3 of .* in int8 are wanted"):
        load(finished, table_dtype="int8", table_folder=folder)
    assert load(finished, table_folder=folder).reader


def test_a_tool_leaves_the_files_of_training_alone(config, finished, tmp_path):
    start = {"mesh.table_memory": "host", "mesh.table_folder": str(tmp_path / "files")}
    train(changed(config, start), tmp_path / "run")
    for call in (
        lambda: load(finished, table_folder=tmp_path / "files"),
        lambda: train(changed(config, start), tmp_path / "other"),
    ):
        with pytest.raises(CheckpointError, match=r"the tables of the run .*run, in training"):
            call()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
    train(changed(config, start), tmp_path / "run")


def test_a_folder_that_is_not_ours_is_refused(finished, tmp_path):
    np.save(tmp_path / "own.npy", np.zeros(3))
    with pytest.raises(WorkdirError, match="has arrays that are no run's tables"):
        load(finished, table_folder=tmp_path)
    with pytest.raises(WorkdirError, match=r"own.npy is no folder"):
        load(finished, table_folder=tmp_path / "own.npy")


def test_files_that_are_being_written_are_in_use(config, finished, tmp_path):
    with locked(tmp_path / "lock"):
        with pytest.raises(WorkdirError, match=r"is in use by .*Use another table_folder"):
            load(finished, table_folder=tmp_path)
        start = {"mesh.table_memory": "host", "mesh.table_folder": str(tmp_path)}
        with pytest.raises(WorkdirError, match=r"is in use by .*Use another table_folder"):
            train(changed(config, start), tmp_path / "run")


def test_files_that_were_changed_are_noticed(finished, tmp_path):
    folder = tmp_path / "files"
    run, path = load(finished, table_folder=folder), folder / "tables.rows.npy"
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"jtok")
    with pytest.raises(CheckpointError, match=r"tables.rows.npy was changed while it was mapped"):
        run.logits(TEXT)
    with pytest.raises(CheckpointError, match=r"Files of .* were changed since they were written"):
        load(finished, table_folder=folder)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"cannot be mapped: .*size"):
        load(finished, table_folder=folder)


@pytest.mark.parametrize("tool", [
    lambda run, memory: generate_main([f"--workdir={run}", f"--prompt={TEXT}", memory]),
    lambda run, memory: evaluate_main([f"--workdir={run}", memory]),
], ids=["generate", "evaluate"])  # fmt: skip
def test_tools_print_the_same(finished, folder, tool, capsys):
    printed = []
    for place in "memory=device", "memory=host", f"folder={folder}":
        tool(finished, f"--table_{place}")
        printed.append(capsys.readouterr().out)
    assert "step 3" in printed[0]
    assert printed == printed[:1] * 3


def test_rows_in_int8_are_the_nearest_of_255(finished, runs):
    run = load(finished, table_dtype="int8")
    ids = np.arange(12, dtype=np.int32).reshape(1, 12)
    expected, found = (one.reader.fetch(ids).leaves["tables"] for one in (runs[1], run))
    rows, scale = np.asarray(expected["rows"]), np.asarray(found["scale"])
    np.testing.assert_allclose(scale, np.abs(rows).max(axis=-1) / 127, rtol=1e-6)
    assert found["rows"].dtype == np.int8
    error = np.abs(rows - found["rows"] * scale[..., None])
    assert np.all(error <= scale[..., None] * 0.501)
    losses = [np.mean([nats for _, nats in one.token_losses(TEXT)]) for one in (runs[1], run)]
    assert 0 < abs(losses[1] - losses[0]) < 0.01


def test_int8_is_for_host_tables_that_are_read(config, finished, tmp_path):
    with pytest.raises(ConfigError, match=r"table_dtype is 'int8', and tables are on"):
        load(finished, table_memory="device", table_dtype="int8")
    start = changed(config, {"mesh.table_memory": "host", "mesh.table_dtype": "int8"})
    with pytest.raises(ConfigError, match="tables are trained in"):
        train(start, tmp_path)


def test_a_full_disk_while_files_are_made_is_told(finished, tmp_path, monkeypatch):
    """After room for the files of `drawn`, which are made first."""
    reserve, calls = os.posix_fallocate, itertools.count()

    def is_full_then(*arguments):
        if next(calls) >= 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return reserve(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", is_full_then)
    with pytest.raises(WorkdirError, match=r"has no room for more rows: .*No space left"):
        load(finished, table_folder=tmp_path / "files")
    monkeypatch.undo()
    assert load(finished, table_folder=tmp_path / "files").reader
