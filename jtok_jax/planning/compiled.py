# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The training step compiled for devices that are not here: pip install -e '.[aot]'."""

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from jtok_jax.config import Config
from jtok_jax.errors import ConfigError, JtokError
from jtok_jax.mesh import AUTO, AXES, mesh_shape
from jtok_jax.planning.topology import Topology
from jtok_jax.training.optimizer import make_optimizer
from jtok_jax.training.state import abstract_state
from jtok_jax.training.step import jit_train_step, step_arguments

# A GpuTargetConfigProto of one H100 SXM, from its data sheet and CUDA's device properties.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448  core_count: 132  fpus_per_core: 128
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  registers_per_core_limit: 65536  registers_per_block_limit: 65536  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  device_memory_size: 84978434048
}
platform_name: "CUDA"  dnn_version_info { major: 9 minor: 8 }  runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


class RefusedError(JtokError):
    """The compiler says that the step does not fit."""


class Compiled(NamedTuple):
    """Holds what the compiler says of a step on one device.

    `total` is the most that lives at one time, arguments included: what an out-of-memory error of
    a TPU compares with the memory there is. (Sizes of temporaries also count what holes take.)
    """

    state: int  # bytes
    total: int  # bytes
    text: str  # the program
    config: Config  # what was compiled

    @property
    def collectives(self) -> dict[str, int]:
        """Return places in the text by kind; those in a loop run once a turn."""
        return dict(collections.Counter(match[2] for match in COLLECTIVE.finditer(self.text)))


def lacks(platform: str) -> str | None:
    """Return why nothing can be compiled here for "tpu" or "gpu", or None."""
    package = {"tpu": "libtpu", "gpu": "jax_cuda13_plugin"}[platform]
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed; pip install -e '.[aot]' on Python 3.12 or newer"
    if platform == "gpu" and shutil.which("ptxas") is None:
        return "ptxas of CUDA 13 is not on the PATH"
    return None


@functools.cache
def absent_devices(name: str, count: int, hosts: int = 1) -> np.ndarray:
    """Return devices of "h100" on as many hosts, or of a TPU topology such as "v5e:2x2"."""
    if name != "h100":
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # one a process
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")  # else libtpu complains of both
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")  # whatever `name` is
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
    else:
        from jax._src import xla_bridge

        if "cuda" not in xla_bridge._topology_factories:
            xla_bridge.discover_pjrt_plugins()
        options = {"target_config": H100, "topology": f"1x{hosts}x{count // hosts}"}
        topology = topologies.get_topology_desc(platform="cuda", topology_name="", **options)
    return np.array(topology.devices[:count])


def stand_in(config: Config, platform: str) -> Config:
    """Return `config` with attention that compiles without a GPU: cuDNN asks for the library."""
    if platform != "gpu" or config.model.attention == "xla":
        return config
    model = dataclasses.replace(config.model, attention="chunked")
    return dataclasses.replace(config, model=model)


def compile_step(config: Config, topology: Topology) -> Compiled:
    """Return the step of train.py, compiled for `topology`.

    Raises:
        ConfigError: a compiler is missing.
        RefusedError: the compiler says that the step does not fit.
    """
    missing = lacks(topology.chip.platform)
    if missing or topology.chip.kind.startswith("NVIDIA H200"):
        raise ConfigError(f"--compile: {missing or 'only H100s and TPUs can be compiled for'}.")
    if config.mesh.table_streaming and topology.chip.platform == "gpu":
        raise ConfigError(
            "--compile: for absent GPUs XLA knows no host memory, which mesh.table_streaming "
            "needs. Plan without --compile, or compile for a TPU."
        )
    config = stand_in(config, topology.chip.platform)
    compiled = compile_for_topology(config, topology)
    sizes = compiled.memory_analysis()
    state, total = sizes.argument_size_in_bytes, sizes.peak_memory_in_bytes
    if sizes.host_argument_size_in_bytes:  # the peak counts host memory too
        total = state + sizes.temp_size_in_bytes
    return Compiled(state, total, compiled.as_text(), config)


def compile_for_topology(config: Config, topology: Topology) -> jax.stages.Compiled:
    """Return the step of train.py as JAX compiles it for `topology`; raises RefusedError."""
    shape = mesh_shape(config.mesh, topology.devices)
    name = "h100" if topology.chip.platform == "gpu" else topology.name
    devices = absent_devices(name, topology.devices, topology.hosts).reshape(shape)
    mesh = Mesh(devices, AXES, axis_types=AUTO)
    optimizer = make_optimizer(config)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), not_cached():
        step = jit_train_step(config, optimizer, mesh, platform=topology.chip.platform)
        state = abstract_state(config, optimizer, mesh)
        lowered = step.lower(*step_arguments(config, optimizer, mesh, state))
        try:
            return lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            raise RefusedError(_reason(str(error))) from error


@contextlib.contextmanager
def not_cached():
    """Turn off the compilation cache, from which programs for absent devices are never read."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _reason(message: str) -> str:
    """Return the line of an error that says how much memory was missing, or the first one."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return next((line for line in lines if re.search(r"exceed|Ran out of memory", line)), lines[0])
