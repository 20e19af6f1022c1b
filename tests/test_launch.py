# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""What starts a process as one of several, seen in flags and environment."""

import pytest

from jtok_jax.errors import ConfigError
from jtok_jax.launch import Launch, recognise

STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_NTASKS": "16"}
SLURM = Launch("SLURM", None, 4, 3, None, "slurm")
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
CPU = {"JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (STEP, SLURM),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_GPUS_ON_NODE": "2"},
         SLURM._replace(local_device_ids=(0, 1))),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_GPUS_ON_NODE": "2"}, SLURM),
        ({"SLURM_NTASKS": "16", "SLURM_PROCID": "0"}, None),  # python in a batch script: no step
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"},
         Launch("Open MPI", None, 2, 1, None, "ompi")),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, Launch("TPU pod", None, 2, 1)),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "2",
          "MEGASCALE_SLICE_ID": "1"}, Launch("TPU pod", None, 4, 3)),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a pod that is no job
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"},
         Launch("Kubernetes job", process_id=2)),
    ],
)  # fmt: skip
def test_launchers_are_recognised_by_their_variables(variables, expected):
    assert recognise(CPU | variables) == expected


def test_flags_win_over_launchers():
    flags = Launch("flags", "a:1", 2, 0, None, "deactivate")
    assert recognise(CPU | STEP, "a:1", 2, 0) == flags
    assert recognise(CPU | STEP, None, 1, None) is None
    assert recognise(CPU | STEP, "a:1") == SLURM._replace(coordinator_address="a:1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("a:1", 2, None), "go together"),
        (("a:1", None, None), "nor a launcher"),
        ((None, 2, 0), "go together"),
        (("a:1", 2, 2), "--process_id is 2; expected 0 to 1 of 2"),
        (("a", 2, 0), "--coordinator_address is 'a'; expected HOST:PORT"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        recognise(CPU, *flags)


def test_mpi_that_does_not_say_where_the_first_process_is_needs_mpi4py():
    with pytest.raises(ConfigError, match="install mpi4py, or pass --coordinator_address"):
        recognise(CPU | OPEN_MPI)


def test_what_libtpu_writes_where_it_finds_no_pod_is_no_pod():
    """A process that has loaded it hands these to its children."""
    said = "WARNING: could not determine this, please set it manually, otherwise it may not work."
    assert recognise({"TPU_WORKER_HOSTNAMES": said, "TPU_WORKER_ID": said}) is None
    assert recognise({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": said}) is None


def test_a_rank_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="SLURM_PROCID is 'x'; expected a whole number"):
        recognise({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "x"})
