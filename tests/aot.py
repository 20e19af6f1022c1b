# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Compiling for real TPUs and H100s on a machine that has neither: pip install -e '.[aot]'."""

import contextlib
import functools
import importlib.util
import os
import re
import shutil

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jtok_jax.mesh import AXES

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


@functools.cache
def h100(count: int = 1) -> Mesh:
    """Mesh of H100s of one host along fsdp; skips the test where they cannot be compiled for."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("jax-cuda13-plugin is not installed (make test-latest installs it)")
    if shutil.which("ptxas") is None:
        pytest.skip("ptxas of CUDA 13 is not on the PATH")
    from jax._src import xla_bridge

    if "cuda" not in xla_bridge._topology_factories:
        xla_bridge.discover_pjrt_plugins()
    options = {"target_config": H100, "topology": f"1x1x{count}"}
    return _mesh(topologies.get_topology_desc(platform="cuda", topology_name="", **options), count)


@functools.cache
def tpu(name: str, count: int = 1) -> Mesh:
    """Mesh of the first devices of a TPU topology such as v5e:2x2, along fsdp."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (make test-latest installs it)")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # one process a test worker
    return _mesh(topologies.get_topology_desc(platform="tpu", topology_name=name), count)


def _mesh(topology, count: int) -> Mesh:
    devices = np.array(topology.devices[:count]).reshape(1, count, 1, 1)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def compile_for(mesh: Mesh, function, *shapes, donate=(), only_lower=False, options=None):
    """`function` of ShapeDtypeStructs, compiled (or only lowered) for the devices of `mesh`."""
    whole = NamedSharding(mesh, PartitionSpec())
    place = lambda x: x.update(sharding=whole) if x.sharding is None else x
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), _not_cached():
        jitted = jax.jit(function, donate_argnums=donate)
        lowered = jitted.lower(*jax.tree.map(place, shapes))
        return lowered if only_lower else lowered.compile(compiler_options=options)


@contextlib.contextmanager
def _not_cached():
    """Programs for absent devices can be written to the compilation cache but never read."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    try:
        yield
    finally:
        jax.config.update(name, before)


def spills(ptxas: str, *, kernels: tuple[int, ...]) -> list[str]:
    """What ptxas said of spilled registers in each kernel (MOSAIC_GPU_DUMP_PTXAS).

    `kernels`: how many there may be; one that this process has compiled before is not told again.
    """
    found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", ptxas)
    assert len(found) in kernels, f"other kernels than expected went through ptxas: {ptxas!r}"
    return [pair for pair in found if pair != ("0", "0")]


def copies_of(text: str, shape: tuple[int, ...]) -> list[str]:
    """Lines of a compiled program that copy, transpose or slice out an array of `shape`."""
    size = ",".join(map(str, shape))
    made = re.compile(rf"= \w+\[{size}\]\S* (copy|transpose|slice|dynamic-slice|broadcast)\(")
    return [line.strip() for line in text.splitlines() if made.search(line)]
