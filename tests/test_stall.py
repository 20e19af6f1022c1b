# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""How a process ends: at a wait that never does, at Ctrl-C, out of memory, without a lock."""

import os
import pathlib
import subprocess
import sys
import time

import pytest
from pythons import oldest

from jtok_jax.errors import STALL_EXIT_CODE, WorkdirError, exit_on_error
from jtok_jax.lock import locked
from jtok_jax.training.guards import STALL_FILE, StallWatch

pytestmark = oldest
SCRIPT = """
import pathlib, sys, time
import train
from small import KINDS
from jtok_jax.config import Config, DataConfig, TrainConfig
from jtok_jax.data.loader import SyntheticSource
from jtok_jax.training import run

def stuck(*args, **options):
    yield from (batch for batch, _ in zip(batches(*args, **options), "abc"))
    time.sleep(600)

config = Config(
    model=KINDS["dense"],
    data=DataConfig(source="synthetic"),
    train=TrainConfig(steps=9, batch_size=2, seq_len=8, stall_seconds=5.0),
)
where = run if sys.argv[2] == "train_batches" else SyntheticSource
batches = getattr(where, sys.argv[2])
setattr(where, sys.argv[2], stuck)
train.train(config, pathlib.Path(sys.argv[1]))
"""
ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(("batches", "awaited"), [
    ("train_batches", "batch for step 4"), ("valid_batches", "batch 4 of the validation"),
])  # fmt: skip
def test_a_batch_that_never_comes_ends_the_run_with_exit_code_7(tmp_path, batches, awaited):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "run", batches],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == STALL_EXIT_CODE == 7, done.stderr
    assert f"Stall: no {awaited} within 5 s" in done.stderr
    stacks = (tmp_path / "run" / STALL_FILE).read_text()
    assert f"no {awaited}" in stacks
    assert "in stuck" in stacks  # where the main thread waits


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_waits_that_end_in_time_leave_nothing_behind(tmp_path, seconds):
    watch = StallWatch(tmp_path / STALL_FILE, seconds)
    with watch.waiting_for("nothing"):
        pass
    time.sleep(0.1)  # past the limit of the wait above, which has ended
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("error", "code", "says"), [
    (KeyboardInterrupt(), 130, "The same command goes on"),
    (RuntimeError("RESOURCE_EXHAUSTED: 9 GiB\nmore"), 1, "RESOURCE_EXHAUSTED: 9 GiB\nA device has"),
])  # fmt: skip
def test_interrupts_and_lack_of_memory_have_a_message(capsys, error, code, says):
    with pytest.raises(SystemExit) as stop, exit_on_error():
        raise error
    assert stop.value.code == code
    assert says in capsys.readouterr().err


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a bug"), exit_on_error():
        raise RuntimeError("a bug")


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    message = r"cannot be locked: .*not implemented.* must have flock"
    with pytest.raises(WorkdirError, match=message), locked(tmp_path / "lock"):
        pass
