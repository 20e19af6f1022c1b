# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A wait that never ends ends the process, with its reason; a wait that ends does not."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

from jtok_jax.errors import STALL_EXIT_CODE
from jtok_jax.training.guards import STALL_FILE, StallWatch

SCRIPT = """
import pathlib, sys, time
import train
from small import KINDS
from jtok_jax.config import Config, DataConfig, TrainConfig

def stuck(*args, first_step, **options):
    yield from (batch for batch, _ in zip(batches(*args, first_step=first_step, **options), "abc"))
    time.sleep(600)

config = Config(
    model=KINDS["dense"],
    data=DataConfig(source="synthetic"),
    train=TrainConfig(steps=9, batch_size=2, seq_len=8, stall_seconds=5.0),
)
batches, train.train_batches = train.train_batches, stuck
train.train(config, pathlib.Path(sys.argv[1]))
"""
ROOT = pathlib.Path(__file__).parents[1]


def test_a_batch_that_never_comes_ends_the_run_with_exit_code_7(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "run"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == STALL_EXIT_CODE == 7, done.stderr
    assert "Stall: no batch for step 4 within 5 s" in done.stderr
    stacks = (tmp_path / "run" / STALL_FILE).read_text()
    assert "no batch for step 4" in stacks
    assert "in stuck" in stacks  # where the main thread waits


@pytest.mark.parametrize("seconds", [0.0, 0.05])
def test_waits_that_end_in_time_leave_nothing_behind(tmp_path, seconds):
    watch = StallWatch(tmp_path, seconds)
    with watch.waiting_for("nothing"):
        pass
    time.sleep(0.1)  # past the limit of the wait above, which has ended
    assert not list(tmp_path.iterdir())
