# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""train.py as a user runs it: killed, interrupted and restarted, against a run left alone."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import CACHE, ROOT
from drawn import drawn
from orbax.checkpoint import v1 as ocp
from pythons import newest, oldest

STEPS = 120
OVERRIDES = {
    "model.vocab_size": 300, "model.model_dim": 16, "model.num_layers": 2, "model.num_heads": 2,
    "model.num_kv_heads": 1, "model.ffn_dim": 24, "train.steps": STEPS, "train.seq_len": 32,
    "checkpoint.every": 25, "evaluation.every": 40, "train.grad_accumulation": 2,
    "train.log_every": 1,
}  # fmt: skip
KINDS = {
    "jtok": {"model.jtok.kind": "jtok", "model.jtok.table_dtype": "bfloat16"},
    "jtok_m": {
        "optimizer.tables.weight_decay": 0.1, "model.jtok.table_dtype": "bfloat16",
        "model.jtok.layers": "odd",
    },
    "moe-jtok": {
        "model.jtok.kind": "jtok", "model.moe.num_experts": 4, "model.jtok.sharing": "shared",
        "model.param_dtype": "bfloat16",
    },
}  # fmt: skip
KILLS = [
    (signal.SIGKILL, 3), (signal.SIGKILL, 25), (signal.SIGINT, 40), (signal.SIGKILL, 51),
    (signal.SIGTERM, 77), (signal.SIGKILL, 99),
]  # fmt: skip


def start(workdir, corpus, overrides, **options) -> subprocess.Popen:
    arguments = [f"--config.{key}={value}" for key, value in (OVERRIDES | overrides).items()]
    command = [sys.executable, "train.py", "--config=configs/quickstart.py"]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", f"--config.data.path={corpus}", *arguments],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        **options,
    )  # fmt: skip


def wait_for_step(process, workdir, step: int) -> None:
    """Until metrics.jsonl has `step`, or the process ends; one that starts over removes the old."""
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
            if lines and lines[-1].endswith("\n") and json.loads(lines[-1])["step"] >= step:
                return
        time.sleep(0.002)


def records(workdir) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def final_state(workdir, steps: int = STEPS) -> dict[str, np.ndarray]:
    checkpointer = ocp.training.Checkpointer(workdir / "checkpoints")
    assert checkpointer.latest.step == steps
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
        for name, leaf in checkpointer.metadata(steps).metadata.items()
    }
    state = checkpointer.load(steps, wanted)
    checkpointer.close()
    return jax.tree.map(np.asarray, state)


@pytest.mark.parametrize("name", [
    pytest.param("jtok", marks=oldest),
    *(pytest.param(name, marks=newest) for name in drawn(["jtok_m", "moe-jtok"], 1)),
])  # fmt: skip
def test_interrupted_runs_equal_one_left_alone(name, corpus, tmp_path):
    """Kills and interrupts in a row: equal losses, batches, validations and final state."""
    alone, broken = tmp_path / "alone", tmp_path / "broken"
    process = start(alone, corpus, KINDS[name])
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    resumed = []
    kills = drawn(KILLS[:2], 1) + drawn(KILLS[2:], 2) if name != "jtok" else KILLS[1:3]
    for number, step in kills:
        process = start(broken, corpus, KINDS[name])
        wait_for_step(process, broken, step)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
        resumed += [line for line in out.splitlines() if line.startswith("resumed at step")]
        if number == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL, err
        else:
            assert process.returncode == 42, err
            assert f"Preempted: {number.name}: saved step" in err
    process = start(broken, corpus, KINDS[name])
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "resumed at step" in out
    # Kills before the first checkpoint start over; the others must have gone on from one.
    assert len(resumed) >= sum(step >= 40 for _, step in kills[:-1]), resumed
    assert [record["step"] for record in records(broken)] == list(range(STEPS + 1))
    for left, right in zip(records(alone), records(broken), strict=True):
        for key in ("loss", "val_loss", "val_bpb", "grad_norm"):
            assert (key in left) == (key in right)
            if key in left:
                assert left[key].hex() == right[key].hex(), (left["step"], key)
        assert left.get("batch_hash") == right.get("batch_hash")
    left, right = final_state(alone), final_state(broken)
    assert left.keys() == right.keys()
    for leaf in left:
        np.testing.assert_array_equal(left[leaf], right[leaf], err_msg=leaf)


def test_second_trainer_exits_3_and_a_killed_one_can_restart_at_once(corpus, tmp_path):
    first = start(tmp_path / "run", corpus, {"train.steps": 100_000, "schedule.steps": 100})
    wait_for_step(first, tmp_path / "run", 2)
    second = start(tmp_path / "run", corpus, {})
    _, err = second.communicate(timeout=120)
    assert second.returncode == 3
    assert f"in use by a process with pid {first.pid}" in err
    assert first.poll() is None
    first.kill()
    first.communicate()
    third = start(tmp_path / "run", corpus, {"train.steps": 100_000, "schedule.steps": 100})
    wait_for_step(third, tmp_path / "run", 3)
    assert third.poll() is None
    third.kill()
    third.communicate()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--config.train.stps=3"], 2, "Did you mean 'train.steps'"),
        (["--config.train.steps=many"], 2, "expected a whole number, such as 1000"),
        (["--config.model.num_heads=3"], 2, "is not a multiple of model.num_heads"),
        (["--config.data.path="], 5, "data.path is empty"),
        (["--workdir="], 2, "--workdir is missing"),
        (["surprise"], 2, "Unexpected argument 'surprise'"),
        (["--config=configs/none.py"], 2, "configs/none.py"),
        (["--confg=x"], 2, "Unknown command line flag 'confg'"),
    ],
)
def test_command_line_errors_have_a_reason_and_a_code(corpus, tmp_path, arguments, code, message):
    command = [sys.executable, "train.py", "--config=configs/quickstart.py"]
    command += [f"--workdir={tmp_path / 'run'}", f"--config.data.path={corpus}", *arguments]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
