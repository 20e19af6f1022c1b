# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""What ends a run of two processes: unlike each other, missing, failing, killed."""

import re
import resource
import signal
import time
import types

import jax
import pytest
from pythons import newest, oldest
from small import prepare_small_corpus
from test_hosts import HEARTBEAT, ends, free_address, settings, start, start_two
from test_resume import wait_for_step

from jtok_jax.errors import ConfigError, HostError
from jtok_jax.hosts import Hosts


class Store:
    """Of the runtime's key-value store what a comparison needs."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        self.values[key] = value

    def key_value_try_get(self, key):
        if key not in self.values:
            raise jax.errors.JaxRuntimeError("NOT_FOUND")
        return self.values[key]

    def key_value_dir_get(self, folder):
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]


def test_who_connected_but_does_not_come_to_compare_is_named():
    state = types.SimpleNamespace(client=Store(), process_id=0, num_processes=2)
    state.client.values["jtok/name/1"] = "elsewhere, pid 7"
    hosts = Hosts(state, start_seconds=0.1)
    message = r"process 1 of 2 \(elsewhere, pid 7\) did not come within 0.1 s .* compare versions"
    with pytest.raises(HostError, match=message):
        hosts.agree("versions", {"jax": "1"}, ConfigError)
    hosts._ended.set()  # the thread that watches


@newest
@pytest.mark.parametrize(
    ("unlike", "code", "message"),
    [
        (
            ((), ("--config.train.batch_size=16",)),
            2,
            r"differ in configuration:\n  train.batch_size: 8 on process 0 .*, 16 on process 1",
        ),
        (
            ((), ("--workdir=elsewhere",)),
            8,
            r"Missing: process [01] \(not started, or with a --workdir that is not the folder",
        ),
    ],
    ids=["configuration", "workdir"],
)
def test_processes_unlike_each_other_are_refused(corpus, tmp_path, unlike, code, message):
    arguments = settings(tmp_path / "run", corpus, {"train.start_seconds": 6})
    cwds = (tmp_path, tmp_path)
    for found, _, err in ends(start_two(arguments, unlike, cwds=cwds)):
        assert found == code, err
        assert re.search(message, err), err
        assert "Traceback" not in err


@newest
def test_other_data_on_one_host_is_refused(tmp_path):
    """The same relative path holds another text there."""
    cwds = tmp_path / "a", tmp_path / "b"
    for seed, folder in enumerate(cwds):
        folder.mkdir()
        prepare_small_corpus(folder, seed=seed)
    arguments = settings(tmp_path / "run", "prepared", {})
    for code, _, err in ends(start_two(arguments, cwds=cwds)):
        assert code == 5, err
        assert "DataError: The processes of this run differ in data and checkpoint" in err
        assert "Traceback" not in err


@newest
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_process_that_never_comes_is_named_by_all(corpus, tmp_path, order):
    """Of three the last; the others come one after the other, and give up so."""
    arguments = settings(tmp_path, corpus, {"train.start_seconds": 6})
    arguments += [f"--coordinator_address={free_address()}", "--num_processes=3"]
    processes = []
    for process in order:
        processes.append(start(["train.py", *arguments, f"--process_id={process}"]))
        time.sleep(2)
    for code, _, err in ends(processes):
        assert code == 8, err
        assert re.search(r"Missing: process 2 \(.*\n  0: .*\n  1: ", err), err


@newest
def test_the_same_start_twice_leaves_the_first_run_alone(corpus, tmp_path):
    """Whether the second has its port or its workdir."""
    address, steps = free_address(), {"train.steps": 100_000, "schedule.steps": 100}
    running = start_two(settings(tmp_path / "run", corpus, steps), address=address)
    wait_for_step(running[0], tmp_path / "run", 2)
    short = steps | {"train.start_seconds": 5}
    again = start_two(settings(tmp_path / "run", corpus, steps))
    other = start_two(settings(tmp_path / "other", corpus, short), address=address)
    for code, _, err in ends(again):
        assert code == 3, err
        assert f"in use by a process with pid {running[0].pid}" in err
    (code, _, err), (code_1, _, err_1) = ends(other)
    assert (code, code_1) == (8, 8), err + err_1
    assert "Missing: process 0" in err_1
    assert re.search(r"Port \d+ of --coordinator_address=.* cannot be used here", err)
    assert [process.poll() for process in running] == [None, None]
    running[1].send_signal(signal.SIGTERM)
    assert [code for code, _, _ in ends(running)] == [42, 42]


BROKEN = """
import sys
import train
from jtok_jax.training import run

def batches(*arguments, **options):
    for number, batch in enumerate(real(*arguments, **options)):
        if number == 5:
            raise run.DataError("made up")
        yield batch

if "--process_id=1" in sys.argv:
    real, run.train_batches = run.train_batches, batches
train.app.run(train.main, flags_parser=train.parse_flags)
"""


@newest
def test_a_failure_of_one_process_ends_all_with_its_code_and_reason(corpus, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text(BROKEN)
    arguments = settings(tmp_path / "run", corpus, {})
    (code, _, err), (code_1, _, err_1) = ends(start_two(arguments, script=str(script)))
    assert (code, code_1) == (5, 5), err + err_1
    assert "DataError: made up" in err_1
    assert re.search(r"HostError: process 1 of 2 \(.*\) has ended: DataError: made up", err)


@oldest
def test_a_save_that_fails_on_one_process_ends_all_at_once(corpus, tmp_path):
    """Its files may grow no further, as on a full disk; Orbax would hold all for 20 minutes."""
    first, second = start_two(settings(tmp_path, corpus, {"train.steps": 5000}))
    wait_for_step(first, tmp_path, 13)
    resource.prlimit(second.pid, resource.RLIMIT_FSIZE, (1000, 1000))
    (code, _, err), (code_1, _, err_1) = ends([first, second], timeout=3 * HEARTBEAT)
    assert (code, code_1, "Traceback" in err + err_1) == (4, 4, False), err + err_1
    assert re.search(r"CheckpointError: Save of step \d+ under .* failed: .*File too large", err_1)
    assert re.search(r"HostError: process 1 of 2 \(.*\) has ended: CheckpointError: Save of", err)


@newest
def test_the_end_of_process_0_ends_the_other_within_the_heartbeat(corpus, tmp_path):
    first, second = start_two(settings(tmp_path, corpus, {"train.steps": 5000}))
    wait_for_step(first, tmp_path, 5)
    first.kill()
    _, (code, _, err) = ends([first, second], timeout=HEARTBEAT)
    assert code not in (0, 42)
    assert "lost another process" in err or "leader task was preempted/died" in err
