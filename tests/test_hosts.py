# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Two processes over loopback: as one run, killed, stopped and started again."""

import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import CACHE, ROOT
from pythons import newest
from test_resume import OVERRIDES, final_state, records, wait_for_step

STEPS, HEARTBEAT = 60, 20
RUN = OVERRIDES | {
    "train.steps": STEPS, "train.batch_size": 8, "evaluation.batch_size": 8, "checkpoint.every": 10,
    "evaluation.every": 30, "mesh.fsdp": 2, "mesh.table_columns": "data,fsdp",
    "train.heartbeat_seconds": HEARTBEAT, "train.start_seconds": 60,
}  # fmt: skip


def environment(devices: int) -> dict[str, str]:
    flags = os.environ.get("XLA_FLAGS", "")
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]),
    }


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def settings(workdir, corpus, overrides: dict) -> list[str]:
    values = [f"--config.{key}={value}" for key, value in (RUN | overrides).items()]
    config = f"--config={ROOT / 'configs' / 'quickstart.py'}"
    return [config, f"--workdir={workdir}", f"--config.data.path={corpus}", *values]


def start(arguments: list[str], *, devices: int = 2, variables=None, **options):
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment(devices) | (variables or {}), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **({"cwd": ROOT} | options),
    )  # fmt: skip


def start_two(
    arguments: list[str], unlike=((), ()), script="train.py", cwds=(ROOT, ROOT), address=None
):
    """Two processes of two devices each; `unlike` has further arguments of each."""
    address = ["--num_processes=2", f"--coordinator_address={address or free_address()}"]
    return [
        start([str(ROOT / script), *arguments, *address, f"--process_id={i}", *unlike[i]], cwd=cwd)
        for i, cwd in enumerate(cwds)
    ]


def ends(processes, timeout: float = 200) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each."""
    try:
        found = [(process, *process.communicate(timeout=timeout)) for process in processes]
        return [(process.returncode, out, err) for process, out, err in found]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """Workdir of a run of two processes that nobody interrupted."""
    workdir = tmp_path_factory.mktemp("hosts") / "alone"
    (code, out, err), (other, out_1, err_1) = ends(start_two(settings(workdir, corpus, {})))
    assert (code, other) == (0, 0), err + err_1
    assert "has 2 of 4 devices and reads 4 of 8 sequences" in out
    assert "mesh: data 2, fsdp 2, expert 1, tensor 1; tables: columns over data x fsdp (4)" in out
    assert f"finished {STEPS} steps" in out
    assert "loss" not in out_1  # one process prints
    assert not (workdir / "starting").exists()
    return workdir


def check_same(expected, found) -> None:
    """Equal losses, batches and final state."""
    for left, right in zip(records(expected), records(found), strict=True):
        for key in ("loss", "val_loss", "grad_norm"):
            assert left.get(key, 0.0).hex() == right.get(key, 0.0).hex(), (left["step"], key)
        assert left.get("batch_hash") == right.get("batch_hash")
    left, right = final_state(expected, STEPS), final_state(found, STEPS)
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


SIGNAL_IN_VALIDATION = """
import functools
import signal
import sys
import train
from jtok_jax.training import run

def ask(stop):
    signal.raise_signal(signal.SIGTERM)
    return stop()

def evaluate(*arguments, stop, **options):
    return real(*arguments, stop=functools.partial(ask, stop), **options)

if "--process_id=1" in sys.argv:
    real, run.evaluate = run.evaluate, evaluate
train.app.run(train.main, flags_parser=train.parse_flags)
"""


@newest
def test_killed_and_stopped_processes_end_together_and_go_on_as_if_nothing_was(
    alone, corpus, tmp_path
):
    """SIGKILL to one, then SIGTERM to one: equal losses, batches and final state.

    Tables lie in host memory, on the device and in files by turns, each process has its columns.
    """
    script = tmp_path / "signal_in_validation.py"
    script.write_text(SIGNAL_IN_VALIDATION)
    host = {"mesh.table_memory": "host"}
    placements = {"memory": host, "files": host | {"mesh.table_folder": str(tmp_path / "files")}}
    arguments = lambda place="device": settings(tmp_path, corpus, placements.get(place, {}))
    first, second = start_two(arguments("memory"))
    wait_for_step(first, tmp_path, 13)
    second.kill()
    killed = time.monotonic()
    (code, _, err), _ = ends([first, second])
    assert time.monotonic() - killed < HEARTBEAT + 10
    if code == 8:  # an exchange broke; else the survivor waited for one to begin
        assert re.search(rf"HostError: no answer from process 1 of 2 .* pid {second.pid}\)", err)
    else:
        assert code == -signal.SIGABRT
        assert "unhealthy (stopped sending heartbeats):\n1\n" in err

    resumed = 10
    for moment in ("start", "validation"):  # before it compiles, of step 30
        if moment == "validation":
            first, second = start_two(arguments(), script=script)
        else:
            first, second = start_two(arguments("files"))
            while "agreed with all on workdir" not in second.stdout.readline():
                assert second.poll() is None
            second.send_signal(signal.SIGTERM)
        (code, out, err), (code_1, _, err_1) = ends([first, second])
        assert (code, code_1) == (42, 42), err + err_1
        assert f"resumed at step {resumed}\n" in out
        found = [re.search(r"on one of the hosts: saved step (\d+)", x) for x in (err, err_1)]
        assert found[0][1] == found[1][1]
        resumed = int(found[0][1])
        assert resumed <= STEPS - 10
        assert (resumed == 30) == (moment == "validation")
    assert "val_loss" not in records(tmp_path)[30]

    (code, out, err), (code_1, _, err_1) = ends(start_two(arguments("memory")))
    assert (code, code_1) == (0, 0), err + err_1
    assert f"resumed at step {resumed}\n" in out
    assert "reads 8 of 8 sequences" in out
    for process in (0, 1):
        rows = np.load(tmp_path / f"files/process-{process}-of-2/tables.rows.npy", mmap_mode="r")
        assert rows.shape[-1] == OVERRIDES["model.model_dim"] // 2
    assert [record["step"] for record in records(tmp_path)] == list(range(STEPS + 1))
    check_same(alone, tmp_path)


@newest
def test_another_number_of_processes_sees_the_same_batches_and_losses(alone, corpus, tmp_path):
    process = start(["train.py", *settings(tmp_path, corpus, {})], devices=4)
    [(code, _, err)] = ends([process])
    assert code == 0, err
    for left, right in zip(records(alone), records(tmp_path), strict=True):
        assert left.get("batch_hash") == right.get("batch_hash")
        assert left.get("unique_ids") == right.get("unique_ids")
        for key in ("loss", "val_loss"):
            np.testing.assert_allclose(left.get(key, 0), right.get(key, 0), rtol=1e-5)


RESTORE = """
import pathlib, sys
import numpy as np
from absl import flags
import train
from jtok_jax.config_dict import from_config_dict
from jtok_jax.data.loader import open_source
from jtok_jax.mesh import make_mesh
from jtok_jax.training.checkpoint import Checkpoints, named_leaves
from jtok_jax.training.optimizer import make_optimizer
from jtok_jax.training.state import abstract_state

def check(config, workdir, hosts):
    source, mesh = open_source(config), make_mesh(config.mesh)
    wanted = abstract_state(config, make_optimizer(config), mesh)
    checkpoints = Checkpoints(workdir, config, data=source.fingerprint)
    state = named_leaves(checkpoints.restore(wanted))
    checkpoints.close()
    saved = np.load(workdir / "state.npz")
    assert saved.keys() == state.keys()
    split = 0
    for name, leaf in state.items():
        split += not leaf.is_fully_replicated
        for shard in leaf.addressable_shards:
            assert np.array_equal(saved[name][shard.index], shard.data), name
    assert split > 10
    print("equal")

train.train = check
train.app.run(train.main, flags_parser=train.parse_flags)
"""


@newest
def test_a_checkpoint_of_one_process_restores_bit_for_bit_on_two(corpus, tmp_path):
    few = {"train.steps": 6, "mesh.fsdp": 1, "mesh.table_columns": ""}
    [(code, _, err)] = ends([start(["train.py", *settings(tmp_path, corpus, few)], devices=1)])
    assert code == 0, err
    np.savez(tmp_path / "state.npz", **final_state(tmp_path, 6))
    script = tmp_path / "restore.py"
    script.write_text(RESTORE)
    arguments = settings(tmp_path, corpus, {"train.steps": 6})
    for code, out, err in ends(start_two(arguments, script=str(script))):
        assert code == 0, err
        assert "equal" in out


SRUN = """#!/bin/bash
# Starts $SLURM_NTASKS tasks as SLURM does; SIGTERM to all once there are five steps.
export SLURM_STEP_NUM_TASKS=$SLURM_NTASKS SLURM_STEP_NODELIST=localhost
for id in $(seq 0 $((SLURM_NTASKS - 1))); do
  SLURM_PROCID=$id SLURM_LOCALID=$id "$@" & tasks+=" $!"
done
while [ -n "$STOP" ] && kill -0 $tasks; do
  grep -q '"step": 5,' "$STOP" && kill -TERM $tasks && STOP=
  sleep 0.05
done 2> /dev/null
code=0
for task in $tasks; do wait $task; found=$?; [ $found -gt $code ] && code=$found; done
exit $code
"""


@newest
def test_the_slurm_recipe_saves_requeues_and_goes_on(corpus, tmp_path):
    """The script of docs/hosts.md, with stand-ins for srun, scontrol and the model's size."""
    text = (ROOT / "docs" / "hosts.md").read_text()
    recipe = re.search(r"```sh\n(#!/bin/bash\n#SBATCH.*?)```", text, re.S)[1]
    assert "--signal=TERM@" in recipe
    own = " ".join(settings(tmp_path / "run", corpus, {}))
    commands = {
        "srun": SRUN,
        "scontrol": f'#!/bin/bash\necho "$@" > {tmp_path}/requeued\n',
        "python": f'#!/bin/bash\nexec {sys.executable} "$1" {own}\n',
        "job": recipe,
    }
    for name, content in commands.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
    variables = environment(2) | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NTASKS": "2",
    }

    def job(**more):
        command = [str(tmp_path / "bin" / "job")]
        options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 200}
        return subprocess.run(command, env=variables | more, check=False, **options)

    done = job(STOP=str(tmp_path / "run" / "metrics.jsonl"))
    assert done.returncode == 42, done.stderr
    assert (tmp_path / "requeued").read_text().split() == ["requeue", str(os.getpid())]
    assert "(SLURM, process 1 of 2, coordinator found by JAX)" in done.stdout
    done = job()
    assert done.returncode == 0, done.stderr
    assert "resumed at step" in done.stdout
    assert f"finished {STEPS} steps" in done.stdout


@newest
def test_processes_of_a_tpu_pod_find_each_other(corpus, tmp_path):
    """By the variables that GKE sets, through JAX's own detection; the devices are CPUs."""
    pytest.importorskip("libtpu")
    variables = {
        "JAX_FORCE_TPU_INIT": "1",  # JAX takes this for a TPU host
        "TPU_WORKER_HOSTNAMES": "localhost,localhost",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
        "MEGASCALE_NUM_SLICES": "1",
        "MEGASCALE_SLICE_ID": "0",
        "JAX_COORDINATOR_PORT": free_address().split(":")[1],
    }
    arguments = ["train.py", *settings(tmp_path, corpus, {"train.steps": 3})]
    processes = [start(arguments, variables=variables | {"TPU_WORKER_ID": x}) for x in "01"]
    for process, (code, out, err) in enumerate(ends(processes)):
        assert code == 0, err
        assert f"(TPU pod, process {process} of 2, coordinator found by JAX)" in out
        assert "has 2 of 4 devices" in out
