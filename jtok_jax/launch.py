# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Finds what started this process as one of several: flags, SLURM, MPI, a TPU pod or Kubernetes.

Only the launcher is detected here. jax.distributed.initialize finds addresses and ranks that are
not given.
"""

import glob
import importlib.util
from collections.abc import Mapping
from typing import NamedTuple

from jtok_jax.errors import ConfigError


class Launch(NamedTuple):
    """The launcher, and arguments of jax.distributed.initialize, which finds what is None."""

    launcher: str
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: tuple[int, ...] | None = None
    cluster_detection_method: str | None = None

    def __str__(self) -> str:
        rank = "" if self.process_id is None else f", process {self.process_id}"
        count = "" if self.num_processes is None else f" of {self.num_processes}"
        address = self.coordinator_address or "found by JAX"
        return f"{self.launcher}{rank}{count}, coordinator {address}"


def recognise(
    environment: Mapping[str, str],
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Launch | None:
    """Return how this process joins others; None if it is alone.

    Args:
        environment: os.environ.
        coordinator_address, num_processes, process_id: flags. They win over a launcher's; a count
            of 1 means alone whatever the environment says.

    Raises:
        ConfigError: flags contradict each other or are not enough, or a rank is no number.
    """
    if num_processes == 1:
        return None
    if num_processes is not None or process_id is not None:
        return _of_flags(coordinator_address, num_processes, process_id)
    launch = _of_environment(environment)
    if launch and coordinator_address:
        return launch._replace(coordinator_address=coordinator_address)
    if coordinator_address:
        raise ConfigError(
            "--coordinator_address is given, but neither --num_processes and --process_id nor "
            "a launcher (SLURM, MPI, TPU pod, Kubernetes) says which process this is."
        )
    return launch


def _of_flags(address: str | None, count: int | None, process: int | None) -> Launch:
    if address is None or count is None or process is None:
        raise ConfigError(
            "--coordinator_address, --num_processes and --process_id go together; given: "
            f"{address}, {count}, {process}. Example for the first of two: "
            "--coordinator_address=HOST:8476 --num_processes=2 --process_id=0"
        )
    if not 0 <= process < count:
        raise ConfigError(f"--process_id is {process}; expected 0 to {count - 1} of {count}.")
    if not address.rpartition(":")[2].isdigit():
        raise ConfigError(f"--coordinator_address is {address!r}; expected HOST:PORT.")
    return Launch("flags", address, count, process, cluster_detection_method="deactivate")


def _of_environment(environment: Mapping[str, str]) -> Launch | None:
    """Return the first launcher that says it started several processes."""
    # Where libtpu finds no pod it writes warnings as values of its variables, for its children.
    environment = {name: x for name, x in environment.items() if not x.startswith("WARNING")}
    number = lambda name: _whole_number(name, environment.get(name) or "0")
    # Open MPI may start its own processes by srun, which leave SLURM's variables to ours.
    if number("OMPI_COMM_WORLD_SIZE") > 1:
        # From version 5 on Open MPI does not say where the first process is: mpi4py finds it.
        method = "ompi" if "OMPI_MCA_orte_hnp_uri" in environment else "mpi4py"
        rank = number("OMPI_COMM_WORLD_RANK")
        return _with_mpi("Open MPI", number("OMPI_COMM_WORLD_SIZE"), rank, method)
    if number("SLURM_STEP_NUM_TASKS") > 1:
        return Launch(
            "SLURM",
            num_processes=number("SLURM_STEP_NUM_TASKS"),  # SLURM_NTASKS is that of the allocation
            process_id=number("SLURM_PROCID"),
            local_device_ids=_gpus_of_a_node(environment),
            cluster_detection_method="slurm",
        )
    if number("PMI_SIZE") > 1:
        return _with_mpi("MPI", number("PMI_SIZE"), number("PMI_RANK"), "mpi4py")
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    if workers:  # of a slice, in GKE
        here, slices = workers.count(",") + 1, number("MEGASCALE_NUM_SLICES") or 1
        rank = number("TPU_WORKER_ID") + here * number("MEGASCALE_SLICE_ID")
        return Launch("TPU pod", None, here * slices, rank) if here * slices > 1 else None
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return Launch("Kubernetes job", process_id=number("JOB_COMPLETION_INDEX"))
    may_be_tpu = environment.get("JAX_PLATFORMS", "tpu").split(",")[0] == "tpu"
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    if may_be_tpu and chips and importlib.util.find_spec("libtpu"):
        return Launch("TPU VM")  # its metadata tell whether there are others
    return None


def _whole_number(name: str, value: str) -> int:
    if not value.isdigit():
        raise ConfigError(f"The environment's {name} is {value!r}; expected a whole number.")
    return int(value)


def _with_mpi(launcher: str, count: int, rank: int, method: str) -> Launch:
    if method == "mpi4py" and importlib.util.find_spec("mpi4py") is None:
        raise ConfigError(
            f"{launcher} started {count} processes but does not say where the first one is; "
            "install mpi4py, or pass --coordinator_address, --num_processes and --process_id."
        )
    return Launch(launcher, None, count, rank, cluster_detection_method=method)


def _gpus_of_a_node(environment: Mapping[str, str]) -> tuple[int, ...] | None:
    """Return all GPUs of a node that runs one SLURM task: JAX would take the first alone."""
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0]
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    return tuple(range(int(gpus))) if tasks == "1" and gpus.isdigit() else None
