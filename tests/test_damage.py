# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Damaged checkpoints: noticed by all that read them, set aside by the run that goes on."""

import contextlib
import dataclasses
import json
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from pythons import oldest
from small import DENSE, JTOK_M
from test_config import changed
from test_data import run_config
from test_train_loop import records

from benchmarks.faults import faults
from jtok_jax import store
from jtok_jax.errors import CheckpointError, DamagedError
from jtok_jax.loading import load
from jtok_jax.store.pieces import Pieces
from jtok_jax.training.checkpoint import Checkpoints
from jtok_jax.training.digest import digests
from jtok_jax.training.saved import load_params
from train import train

pytestmark = oldest


@pytest.fixture(scope="module")
def config(corpus):
    model = dataclasses.replace(DENSE, vocab_size=300, jtok=JTOK_M)
    start = dataclasses.replace(run_config(corpus, steps=8), model=model)
    return changed(start, {"checkpoint.every": 4})


def flip_a_bit(folder, number: int = 0) -> None:
    """Flip one bit of the arrays of a checkpoint."""
    path = max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1 << number
    path.write_bytes(data)


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used(
    config, finished, workdir, capsys
):
    """It then does what an undamaged run does, bit for bit."""
    flip_a_bit(workdir / "checkpoints" / "8")
    train(changed(config, {"train.steps": 10, "schedule.steps": 8}), workdir)
    told = capsys.readouterr().out
    assert "checkpoints/8 is damaged: " in told
    assert "Set aside as 8.bad." in told
    assert "resumed at step 4\n" in told
    kept = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert kept == {"8.bad", "8", "10"}
    assert [one["step"] for one in records(workdir)] == list(range(11))
    before, after = load_params(finished).params, load_params(workdir, step="8").params
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name], err_msg=name)


def test_metadata_that_is_no_json_is_damage_and_set_aside(config, workdir, capsys):
    path = workdir / "checkpoints" / "8" / "_CHECKPOINT_METADATA"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DamagedError, match="checkpoints/8 is damaged: Unterminated"):
        load_params(workdir)
    train(changed(config, {"train.steps": 8}), workdir)
    assert "Set aside as 8.bad.\nresumed at step 4\n" in capsys.readouterr().out


def test_an_older_checkpoint_that_is_damaged_keeps_nobody_from_the_newest(config, workdir, capsys):
    path = workdir / "checkpoints" / "4" / "_CHECKPOINT_METADATA"
    path.write_bytes(path.read_bytes()[:100])
    train(changed(config, {"train.steps": 10, "schedule.steps": 8}), workdir)
    assert "Set aside as 4.bad.\n" in (told := capsys.readouterr().out)
    assert "resumed at step 8\n" in told


def test_a_disk_that_fails_is_no_damage(config, workdir, monkeypatch):
    """Nothing is set aside: the checkpoint may be sound."""

    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(ocp.training.Checkpointer, "load", fail)
    with pytest.raises(CheckpointError, match="It may be sound: mend the disk") as told:
        train(changed(config, {"train.steps": 10, "schedule.steps": 8}), workdir)
    assert not isinstance(told.value, DamagedError)
    assert not list(workdir.glob("checkpoints/*.bad"))


def test_the_only_checkpoint_is_never_set_aside(config, workdir):
    shutil.rmtree(workdir / "checkpoints" / "4")
    flip_a_bit(workdir / "checkpoints" / "8", 3)
    longer = changed(config, {"train.steps": 10, "schedule.steps": 8})
    with pytest.raises(DamagedError, match="go on from step 0: there is no checkpoint before it"):
        train(longer, workdir)
    assert (workdir / "checkpoints" / "8").is_dir()


def test_the_tools_read_nothing_that_is_damaged(workdir):
    flip_a_bit(workdir / "checkpoints" / "8")
    with pytest.raises(DamagedError, match=r"is damaged: .* go on from step 4"):
        load(workdir)
    assert load_params(workdir, step="4").step == 4


def test_a_configuration_that_changed_on_disk_is_damage(workdir):
    path = workdir / "checkpoints" / "8" / "_CHECKPOINT_METADATA"
    saved = json.loads(path.read_text())
    saved["custom_metadata"]["config"]["model"]["norm_eps"] = 1e-5
    path.write_text(json.dumps(saved))
    with pytest.raises(DamagedError, match="its metadata differs from what was saved"):
        load_params(workdir)


def test_checkpoints_of_earlier_versions_have_no_digests(workdir):
    path = workdir / "checkpoints" / "8" / "_CHECKPOINT_METADATA"
    saved = json.loads(path.read_text())
    del saved["custom_metadata"]["digests"], saved["custom_metadata"]["digest"]
    path.write_text(json.dumps(saved))
    assert load_params(workdir).step == 8


def digest_oracle(words: np.ndarray) -> int:
    """The digest in Python's integers: MurmurHash3's finalizer of each word and its place."""
    found, dtype = 0, {1: np.uint16, 2: np.uint32}[words.shape[-1]]
    for place, word in enumerate(words.reshape(-1).view(dtype).tolist()):
        x = word ^ place * 0x9E3779B9 % (1 << 32)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = (x ^ x >> shift) * factor % (1 << 32)
        found += x ^ x >> 16
    return found % (1 << 32)


@pytest.mark.parametrize("rows", [5, 16])  # 16 are folded
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.uint32])
def test_every_bit_and_every_place_counts(dtype, rows):
    rng = np.random.default_rng(0)
    width = jnp.dtype(dtype).itemsize
    words = rng.integers(0, 1 << 16, (rows, 7, width // 2), np.uint16)
    as_array = lambda x: jax.lax.bitcast_convert_type(
        jnp.asarray(x[..., 0] if width == 2 else x), dtype
    )
    first = digests({"x": as_array(words)})["x"]
    pieces = Pieces.of(np.asarray(as_array(words)))
    assert first == digests({"x": pieces})["x"] == digest_oracle(words)
    others = [words[::-1], words[:, ::-1], np.zeros_like(words)]
    for bit in range(8 * width):
        other = words.copy()
        other[3, 2, bit // 16] ^= np.uint16(1 << bit % 16)
        others.append(other)
    found = [digests({"x": as_array(other)})["x"] for other in others]
    assert first not in found
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (2, 40, 3), (1, 2, 40, 3), (40,)])
def test_a_large_array_is_written_in_pieces_of_its_longest_axis(monkeypatch, shape):
    monkeypatch.setattr(store.pieces, "PIECE", 64)
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    found, most = np.full(shape, np.nan, np.float32), max(64, array.nbytes // 40)
    for begin, piece in Pieces.of(array).local_pieces():
        assert piece.nbytes <= most
        found[tuple(slice(a, a + n) for a, n in zip(begin, piece.shape, strict=True))] = piece
    np.testing.assert_array_equal(found, array)


# Orbax leaves coroutines behind that read what was damaged.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_faults_of_every_kind_are_noticed_or_harmless(config, finished, tmp_path):
    """A few of each kind; benchmarks/faults.py counts many."""
    expected, folder = load_params(finished).params, finished / "checkpoints" / "8"
    some, kinds = {}, []
    for kind, apply in faults(folder, 6, 4, seed=1):
        some[kind] = some.get(kind, 0) + 1
        if some[kind] > 6:
            continue
        kinds.append(kind)
        copy = tmp_path / str(len(kinds))
        shutil.copytree(folder, copy / "checkpoints" / "8")
        apply(copy / "checkpoints" / "8")
        with contextlib.suppress(CheckpointError):
            found = load_params(copy).params
            for name, value in expected.items():
                np.testing.assert_array_equal(value, found[name], err_msg=f"{kind} {name}")
        shutil.rmtree(copy)
    assert len(set(kinds)) == 7


def test_a_device_without_memory_sets_nothing_aside(config, workdir, monkeypatch):
    """Orbax wraps what the device says."""

    def fail(*_, **__):
        try:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        except RuntimeError as error:
            raise ValueError("Failed to load checkpointable") from error

    monkeypatch.setattr(ocp.training.Checkpointer, "load", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        train(changed(config, {"train.steps": 10, "schedule.steps": 8}), workdir)
    assert not list(workdir.glob("checkpoints/*.bad"))


def test_a_loop_that_a_failed_save_closed_is_no_news(config, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: told.append(unraisable.exc_value))
    checkpoints = Checkpoints(tmp_path, config, data={})
    late, other = RuntimeError("Event loop is closed"), RuntimeError("another")
    for error in (late, other):
        sys.unraisablehook(types.SimpleNamespace(exc_value=error, object=None))
    checkpoints.close()
    assert told == [other]
