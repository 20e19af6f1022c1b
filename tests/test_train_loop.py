# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""train.py in this process: what it writes and what it refuses."""

import dataclasses
import json
import logging
import re
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pythons import oldest
from small import KINDS
from test_config import changed
from test_data import run_config

import train as train_module
from jtok_jax.data import manifest
from jtok_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    WorkdirError,
)
from jtok_jax.lock import locked
from jtok_jax.training import step as step_module
from jtok_jax.training.metrics import open_writers
from jtok_jax.training.saved import load_params

train = train_module.train


@pytest.fixture(scope="module")
def config(corpus):
    """Eleven steps of a JTok-M model; saves at 4, 8, 11; evaluates at 0, 5, 10, 11."""
    model = dataclasses.replace(KINDS["dense-jtok_m"], vocab_size=300)
    start = dataclasses.replace(run_config(corpus, steps=11), model=model)
    changes = {"checkpoint.every": 4, "evaluation.every": 5, "train.log_every": 3}
    return changed(start, changes)


def records(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def check_same_run(left, right):
    """Equal records, but for timings, and equal parameters at the end."""
    for old, new in zip(records(left), records(right), strict=True):
        for key in ("step", "loss", "batch_hash", "val_loss", "val_bpb", "grad_norm"):
            assert old.get(key) == new.get(key), key
    old, new = load_params(left).params, load_params(right).params
    for name, value in old.items():
        np.testing.assert_array_equal(value, new[name], err_msg=name)


def test_metrics_have_every_step_once_with_the_promised_names(finished):
    found = records(finished)
    assert [record["step"] for record in found] == list(range(12))
    for record in found[1:]:
        assert {"loss", "tokens_per_second", "batch_hash"} <= record.keys()
    evaluated = [record["step"] for record in found if "val_loss" in record]
    assert evaluated == [0, 5, 10, 11]
    assert all("val_bpb" in found[step] for step in evaluated)
    health = {"hidden_std", "row_norm", "gate_size", "router_entropy", "router_load"}
    with_health = [record["step"] for record in found if health <= record.keys()]
    assert with_health == [3, 5, 6, 9, 10, 11]
    assert np.shape(found[3]["router_load"]) == (3, 5)
    np.testing.assert_allclose(np.sum(found[3]["router_load"], axis=1), 1.0, rtol=1e-5)
    assert found[11]["loss"] < found[1]["loss"]


def test_checkpoints_are_kept_as_configured(finished):
    steps = sorted(int(path.name) for path in (finished / "checkpoints").iterdir())
    assert steps == [8, 11]


@oldest
def test_console_shows_counts_progress_and_validation(config, tmp_path, capsys):
    train(changed(config, {"train.steps": 4, "checkpoint.keep": 1}), tmp_path)
    out = capsys.readouterr().out
    for name in ("backbone", "tables", "total", "active", "optimizer", "FLOPs"):
        assert re.search(rf"^ *{name} +[\d,]+ ", out, re.MULTILINE), name
    line = r"step 3/4  loss \d\.\d+  [\d,]+ tokens/s  MFU n/a  \d+ ms/step  data wait \d+ ms  0:"
    assert re.search(line, out), out
    assert re.search(r"step 4: validation loss \d\.\d+ nats/token, \d\.\d+ bits/byte", out)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["4"]


def test_no_program_is_compiled_after_the_first_step(config, tmp_path):
    counts = []
    listener = lambda name, *_, **__: counts.append(name) if "backend_compile" in name else None
    jax.monitoring.register_event_duration_secs_listener(listener)
    totals = []
    for steps in (3, 9):
        jax.clear_caches()
        before = len(counts)
        train(changed(config, {"train.steps": steps}), tmp_path / str(steps))
        totals.append(len(counts) - before)
    assert totals[0] == totals[1] > 0


def test_a_finished_run_does_nothing_more(config, workdir, capsys):
    before = (workdir / "metrics.jsonl").read_text()
    train(config, workdir)
    assert "nothing to do" in capsys.readouterr().out
    assert (workdir / "metrics.jsonl").read_text() == before


def test_going_on_from_an_earlier_checkpoint_repeats_the_same_numbers(config, finished, workdir):
    shutil.rmtree(workdir / "checkpoints" / "11")
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')  # as a killed process leaves it
    train(config, workdir)
    check_same_run(finished, workdir)


def times_final_norm(monkeypatch, factor: float, *, after: int) -> None:
    """A fault that turns up after a step."""
    real = step_module.make_train_step

    def faulty(config, optimizer, mesh):
        step = real(config, optimizer, mesh)

        def wrapped(state, ids, targets):
            state, metrics = step(state, ids, targets)
            now = jnp.where(state.step == after, factor, 1.0)
            params = state.params | {"final_norm": state.params["final_norm"] * now}
            return state._replace(params=params), metrics

        return wrapped

    monkeypatch.setattr(step_module, "make_train_step", faulty)


@oldest
def test_steps_that_are_not_finite_stop_the_run(config, tmp_path, monkeypatch):
    """Parameters that turn NaN after step 5 (as by a fault): K bad steps, then exit 6, no save."""
    times_final_norm(monkeypatch, jnp.nan, after=5)
    changes = {"train.max_bad_steps": 3, "checkpoint.every": 4, "train.steps": 20}
    with pytest.raises(NonFiniteError, match=r"Steps 6 to 8: .* last checkpoint: 4"):
        train(changed(config, changes), tmp_path)
    assert NonFiniteError.exit_code == 6
    found = records(tmp_path)
    assert [r["step"] for r in found if r.get("bad_in_row")] == [6, 7, 8]
    assert all(found[step]["loss"] is None for step in (6, 7, 8))
    assert np.all(np.isfinite(load_params(tmp_path).params["final_norm"]))


@oldest
def test_a_run_whose_last_validation_is_not_finite_is_not_finished(config, tmp_path, monkeypatch):
    """Though every step and parameter is."""
    times_final_norm(monkeypatch, 1e38, after=3)
    changes = {"train.steps": 3, "checkpoint.every": 2}
    with pytest.raises(NonFiniteError, match=r"Step 3, the last: the validation .*checkpoint: 2\."):
        train(changed(config, changes), tmp_path)
    assert records(tmp_path)[-1]["val_loss"] is None
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_parameters_that_overflow_are_never_saved(config, tmp_path):
    """Loss and gradients stay finite here: the norms hide a huge embedding."""
    changes = {"optimizer.learning_rate": 1e30, "checkpoint.every": 1}
    with pytest.raises(NonFiniteError):
        train(changed(config, changes), tmp_path)
    params = load_params(tmp_path).params
    assert all(np.all(np.isfinite(value)) for value in params.values())


# --------------------------------------------------------------------------- refused


@oldest
def test_more_different_ids_than_there_is_room_for_are_refused(config, tmp_path):
    """At the step that has them, with what to pass; that step is neither applied nor saved."""
    config = changed(config, {"checkpoint.every": 1, "evaluation.every": 100})
    train(config, tmp_path / "all")
    found = [record["unique_ids"] for record in records(tmp_path / "all")[1:]]
    train(changed(config, {"train.max_unique_ids": max(found)}), tmp_path / "exact")
    assert [r["unique_ids"] for r in records(tmp_path / "exact")[1:]] == found
    full = 1 + found.index(max(found))
    message = f"Step {full} uses {max(found)} different ids, .*max_unique_ids={max(found)} or more"
    with pytest.raises(DataError, match=message):
        train(changed(config, {"train.max_unique_ids": max(found) - 1}), tmp_path / "few")
    saved = [int(path.name) for path in (tmp_path / "few" / "checkpoints").iterdir()]
    assert max(saved, default=0) == full - 1


def test_a_second_trainer_is_refused_before_it_touches_anything(config, workdir):
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    with locked(workdir / "lock"):
        with_lock = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
        with pytest.raises(WorkdirError, match=r"in use by a process with pid \d+ on"):
            train(config, workdir)
        assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == with_lock
    assert before.keys() == with_lock.keys()
    train(config, workdir)  # the lock went with its holder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.seed": 5}, "train.seed: 0 in the run, 5 now"),
        ({"model.jtok.top_k": 1}, "model.jtok.top_k: 2 in the run, 1 now"),
        ({"train.steps": 22}, "pass --config.schedule.steps=11"),
    ],
)
def test_a_workdir_of_another_configuration_is_refused(config, workdir, changes, message):
    before = (workdir / "metrics.jsonl").read_text(), (workdir / "config.json").read_text()
    with pytest.raises(ConfigError, match=message):
        train(changed(config, changes), workdir)
    after = (workdir / "metrics.jsonl").read_text(), (workdir / "config.json").read_text()
    assert before == after


@oldest
def test_training_longer_on_the_same_schedule_is_allowed(config, workdir):
    longer = {"train.steps": 13, "schedule.steps": 11, "evaluation.every": 100}
    train(changed(config, longer), workdir)
    assert [record["step"] for record in records(workdir)] == list(range(14))


def test_changed_data_is_refused_with_a_diff(config, workdir, tmp_path, corpus):
    other = shutil.copytree(corpus, tmp_path / "other")
    found = manifest.read_manifest(other)
    valid = dataclasses.replace(found.valid, targets=found.valid.targets - 1)
    manifest.write_manifest(other, dataclasses.replace(found, valid=valid))
    with pytest.raises(DataError, match=r"valid: '[0-9a-f]{64}' in the run, '[0-9a-f]{64}' now"):
        train(changed(config, {"data.path": str(other), "train.steps": 11}), workdir)
    moved = shutil.copytree(corpus, tmp_path / "moved")
    train(changed(config, {"data.path": str(moved)}), workdir)  # the same data elsewhere is fine


def test_a_checkpoint_with_other_leaves_is_refused(config, workdir):
    """As after a change of the code: the metadata of the configuration still agrees."""
    path = workdir / "checkpoints" / "11" / "_CHECKPOINT_METADATA"
    saved = json.loads(path.read_text())
    del saved["custom_metadata"]["digest"]
    tables = '"num_tables": {}, "top_k": 2, "router_input"'  # of model.jtok
    text = json.dumps(saved).replace(tables.format(5), tables.format(4))
    path.write_text(text)
    (workdir / "config.json").unlink()
    smaller = changed(config, {"model.jtok.num_tables": 4, "train.steps": 12, "schedule.steps": 11})
    message = r"params/tables: saved float32\(3, 5, 300, 12\), configuration gives .*3, 4, 300, 12"
    for read in (lambda: train(smaller, workdir), lambda: load_params(workdir)):
        with pytest.raises(CheckpointError, match=message):
            read()


@pytest.mark.parametrize("error", [TimeoutError("finalize took 300 s"), OSError("disk full")])
def test_a_failed_save_stops_the_run(config, tmp_path, monkeypatch, error):
    """Also where it fails by a time-out, which looks like a save still running."""

    class Failed:
        def result(self, timeout=None):
            raise error

    monkeypatch.setattr(
        "orbax.checkpoint.v1.training.Checkpointer.save_checkpointables_async",
        lambda *_, **__: Failed(),
    )
    with pytest.raises(CheckpointError, match=r"Save of step 4 .* failed: .*(300 s|disk full)"):
        train(config, tmp_path)
    assert records(tmp_path)[-1]["step"] <= 5
    assert not logging.getLogger("absl").filters  # of the next run in this process


@pytest.mark.parametrize("also_not_finite", [False, True])
def test_a_save_that_failed_in_the_log_alone_stops_the_run(
    config, tmp_path, monkeypatch, caplog, also_not_finite
):
    """As of one of several processes, whose response does not end before those of the others.

    Nor may the run wait for it where it ends for another reason.
    """

    class Waiting:
        def result(self, timeout=None):
            raise TimeoutError

    def fail():
        for error in (OSError("disk full"), RuntimeError("all saves failed")):
            told = {"levelno": logging.ERROR, "module": "future", "exc_info": (None, error, None)}
            logging.getLogger("absl").handle(logging.makeLogRecord(told))

    def unsound(record, *_):
        if record["step"] == 5:  # saved is step 4
            fail()
            raise NonFiniteError("Steps 3 to 5")

    def save(*_, **__):
        if not also_not_finite:
            fail()
        return Waiting()

    closed, orbax = [], "orbax.checkpoint.v1.training.Checkpointer"
    monkeypatch.setattr(f"{orbax}.save_checkpointables_async", save)
    monkeypatch.setattr(f"{orbax}.close", lambda *_: closed.append(1))  # waits for the others
    if also_not_finite:
        monkeypatch.setattr("jtok_jax.training.guards.require_sound", unsound)
    with pytest.raises(CheckpointError, match=r"Save of step 4 .* failed: .*disk full") as told:
        train(config, tmp_path)
    assert isinstance(told.value.__cause__.__context__, NonFiniteError) == also_not_finite
    assert not caplog.messages
    assert not closed


@oldest
def test_a_start_that_failed_does_not_claim_the_workdir(config, tmp_path):
    with pytest.raises(ConfigError, match="not an NVIDIA GPU"):
        train(changed(config, {"model.attention": "cudnn"}), tmp_path)
    train(changed(config, {"train.steps": 2}), tmp_path)


@oldest
def test_tensorboard_files_are_written_if_asked(config, tmp_path, monkeypatch):
    train(changed(config, {"train.steps": 2, "logging.tensorboard": True}), tmp_path)
    (file,) = (tmp_path / "tensorboard").iterdir()
    for name in (b"val_loss", b"unique_ids", b"bad_steps", b"hidden_std/2", b"router_load/0/4"):
        assert name in file.read_bytes()
    starts = []  # what was written of these steps before does not count
    board = lambda folder, *, purge_step: starts.append(purge_step)
    monkeypatch.setattr("tensorboardX.SummaryWriter", board)
    for first in (0, 3):
        open_writers(changed(config, {"logging.tensorboard": True}), tmp_path, first)[0].close()
    assert starts == [0, 3]


def test_tensorboard_without_its_package_is_refused_and_nothing_lost(config, workdir, monkeypatch):
    before = (workdir / "metrics.jsonl").read_text()
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    longer = {"train.steps": 12, "schedule.steps": 11, "logging.tensorboard": True}
    with pytest.raises(ConfigError, match="tensorboardX is not installed"):
        train(changed(config, longer), workdir)
    assert (workdir / "metrics.jsonl").read_text() == before
