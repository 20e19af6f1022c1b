# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""SIGTERM and Ctrl-C at moments that are not between two steps."""

import dataclasses
import itertools
import os
import shlex
import signal
import subprocess
import sys
from unittest import mock

import pytest
from conftest import CACHE, ROOT
from pythons import oldest
from small import KINDS
from test_config import changed
from test_data import run_config
from test_resume import OVERRIDES, wait_for_step
from test_train_loop import check_same_run, records, times_final_norm

import train as train_module
from jtok_jax.errors import CheckpointError, NonFiniteError, Preempted
from jtok_jax.training import run as run_module
from jtok_jax.training.evaluate import Validation
from jtok_jax.training.metrics import open_writers
from jtok_jax.training.saved import load_params

pytestmark = oldest
train = train_module.train


@pytest.fixture(scope="module")
def config(corpus):
    """Eleven steps of a JTok model; saves at 4, 8, 11; evaluates at 0, 5, 10, 11."""
    model = dataclasses.replace(KINDS["dense-jtok"], vocab_size=300)
    start = dataclasses.replace(run_config(corpus, steps=11), model=model)
    return changed(start, {"checkpoint.every": 4, "evaluation.every": 5, "train.log_every": 3})


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """Workdir of a run left alone."""
    workdir = tmp_path_factory.mktemp("finished")
    train(config, workdir)
    return workdir


def signal_in_validation(monkeypatch, number: int) -> None:
    """SIGTERM after the first batch of the validation of that number, from 1."""
    real, validations = run_module.evaluate, itertools.count(1)

    def evaluate(*arguments, stop, **options):
        asked, now = itertools.count(), next(validations)

        def ask():
            if now == number and next(asked) == 1:
                signal.raise_signal(signal.SIGTERM)
            return stop()

        return real(*arguments, stop=ask, **options)

    monkeypatch.setattr(run_module, "evaluate", evaluate)


@pytest.mark.parametrize(("validation", "step"), [(1, 0), (2, 5), (4, 11)])
def test_a_signal_ends_a_validation_which_the_same_command_makes_first(
    config, finished, tmp_path, monkeypatch, capsys, validation, step
):
    """Twice: also the one made first may be cut short."""
    again = ": saved" if step else " while validating"
    for number, says in ((validation, again), (1, " while validating")):
        with monkeypatch.context() as patched:
            signal_in_validation(patched, number)
            with pytest.raises(Preempted, match=rf"SIGTERM{says} step {step}\. "):
                train(config, tmp_path)
        assert len(records(tmp_path)) == (step + 1 if step else 0)
        assert not any("val_loss" in record for record in records(tmp_path)[step:])
    capsys.readouterr()
    train(config, tmp_path)
    out = capsys.readouterr().out
    assert ("resumed at step" in out) == (step > 0)
    assert out.index(f"step {step}: validation loss") < out.index("finished 11 steps")
    check_same_run(finished, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    train(config, tmp_path)
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_run_whose_last_validation_is_not_finite_does_not_end_as_finished(
    config, tmp_path, monkeypatch
):
    """Though it was saved, as a signal came before the validation said so."""
    times_final_norm(monkeypatch, 1e38, after=11)
    with monkeypatch.context() as patched:
        signal_in_validation(patched, 4)
        with pytest.raises(Preempted, match="saved step 11"):
            train(config, tmp_path)
    for _ in range(2):
        with pytest.raises(NonFiniteError, match=r"Step 11, the last: .* last checkpoint: 11"):
            train(config, tmp_path)


def test_a_checkpoint_is_ranked_by_the_validation_that_the_same_command_makes_first(
    config, tmp_path, monkeypatch
):
    config = changed(
        config, {"checkpoint.every": 5, "checkpoint.keep": 1, "checkpoint.keep_best": 1}
    )
    with monkeypatch.context() as patched:
        signal_in_validation(patched, 2)
        with pytest.raises(Preempted, match="saved step 5"):
            train(config, tmp_path)
    losses = iter([1.0, 2.0, 3.0])  # of steps 5, 10 and 11
    monkeypatch.setattr(run_module, "evaluate", lambda *_, **__: Validation(next(losses), 0.0))
    train(config, tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"5", "11"}
    assert load_params(tmp_path, step="best").step == 5


def test_ctrl_c_of_a_run_with_its_tee_saves(corpus, tmp_path):
    """The terminal sends it to both, and tee ends first: later lines have no reader."""
    fields = OVERRIDES | {"train.steps": 5000, "checkpoint.every": 5000, "data.path": corpus}
    options = [f"--config.{key}={value}" for key, value in fields.items()]
    run = [sys.executable, "train.py", "--config=configs/quickstart.py", f"--workdir={tmp_path}"]
    log, code = tmp_path / "log", tmp_path / "code"
    line = f"{shlex.join([*run, *options])} 2>&1 | tee {log}; echo ${{PIPESTATUS[0]}} > {code}"
    # As of a terminal's job: Python started in the background would have SIGINT ignored.
    shell = subprocess.Popen(
        ["bash", "-c", f"trap : INT; {line}"], cwd=ROOT, stdout=subprocess.DEVNULL,
        env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(CACHE)}, start_new_session=True,
    )  # fmt: skip
    wait_for_step(shell, tmp_path, 60)
    os.killpg(shell.pid, signal.SIGINT)
    shell.wait(timeout=100)
    assert code.read_text() == "42\n", log.read_text()
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert records(tmp_path)[-1]["step"] == int(saved.name) >= 60


def test_a_record_is_completed_at_once_or_not_at_all(config, tmp_path, monkeypatch):
    path, board = tmp_path / "metrics.jsonl", mock.Mock()
    monkeypatch.setattr("tensorboardX.SummaryWriter", lambda *_, **__: board)
    path.write_text('{"step": 4, "loss": 3.0}\n{"step": 5, "loss": 2.0}\n{"step": 6, "loss": 1.0}')
    writers = open_writers(changed(config, {"logging.tensorboard": True}), tmp_path, first_step=6)

    def write(step, values):
        for writer in writers:
            writer.write(step, values)

    with monkeypatch.context() as patched:
        patched.setattr("pathlib.Path.replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write(5, {"val_loss": 0.5})
    assert [record["step"] for record in records(tmp_path)] == [4, 5]
    write(5, {"val_loss": 0.5})
    assert records(tmp_path)[1:] == [{"step": 5, "loss": 2.0, "val_loss": 0.5}]
    board.add_scalar.assert_called_once_with("val_loss", 0.5, 5)
    for writer in writers:
        writer.close()


def test_metrics_that_are_damaged_are_told(config, finished, tmp_path):
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:-1], "garbage"]) + "\n")
    with pytest.raises(CheckpointError, match=r"metrics.jsonl, line 12 is damaged .* move that"):
        open_writers(config, tmp_path, first_step=12)
