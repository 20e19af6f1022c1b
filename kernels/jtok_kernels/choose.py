# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Which implementation runs: the one asked for, or an error; None is chosen by platform."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jtok_kernels import mosaic_gpu, mosaic_gpu_block, mosaic_tpu, xla

IMPLEMENTATIONS = ("xla", "mosaic_gpu", "mosaic_tpu")
INTERPRET = ":interpret"  # after a name: its kernels simulated on a CPU, with races detected
FIRST_JAX = (0, 11, 1)  # of the Mosaic GPU interface used here
SINCE_HOPPER = ("NVIDIA H", "NVIDIA GH", "NVIDIA B", "NVIDIA GB")


class Choice(NamedTuple):
    """The implementation that runs, and why."""

    name: str
    reason: str


class _Device(NamedTuple):
    platform: str
    kind: str
    count: int


def choose(
    implementation: str | None,
    *,
    dim: int,
    dtype: jnp.dtype,
    num_tables: int = 1,
    top_k: int = 1,
    local: bool | None = None,
) -> Choice:
    """Return the implementation for tables with rows of `dim` entries of `dtype`, and why.

    The device is that of an abstract mesh in use (as when compiling ahead of time), else the
    default one. With several devices only XLA is chosen, but not refused what is asked for: it may
    be for one device of them, or inside `shard_map`.

    Args:
        num_tables, top_k: E and K of `jtok_m`.
        local: for one device's part inside `shard_map`, however many devices there are; None: where
            this is traced inside one, over all axes of its mesh.

    Raises:
        ValueError: the implementation asked for does not exist or cannot run there.
    """
    device, tables = _device(), (dim, jnp.dtype(dtype), num_tables, top_k)
    mesh = jax.sharding.get_abstract_mesh()
    if local is None:
        local = not mesh.empty and mesh.are_all_axes_manual
    if implementation is None:
        name = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}.get(device.platform, "xla")
        if name == "xla":
            return Choice("xla", f"{device.platform} has no kernels of its own")
        obstacle = _obstacle(name, *tables) or _place(name, device)
        if not obstacle and not local and device.count > 1:
            obstacle = f"there are {device.count} devices, and XLA splits only code of its own"
        return Choice("xla", obstacle) if obstacle else Choice(name, device.kind)
    name = implementation.removesuffix(INTERPRET)
    if name not in IMPLEMENTATIONS or implementation == "xla" + INTERPRET:
        known = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"implementation is {implementation!r}; expected one of {known}.")
    simulated = implementation != name
    obstacle = (None if simulated else _place(name, device)) or _obstacle(name, *tables)
    if obstacle:
        raise ValueError(f"implementation {implementation!r} cannot run: {obstacle}; 'xla' can.")
    return Choice(implementation, "asked for")


def backend(implementation: str):
    """Return the functions of an implementation."""
    name = implementation.removesuffix(INTERPRET)
    if name == "xla":
        return xla
    make = {"mosaic_gpu": mosaic_gpu.MosaicGpu, "mosaic_tpu": mosaic_tpu.MosaicTpu}[name]
    return make(implementation.endswith(INTERPRET))


def _obstacle(name: str, dim: int, dtype: jnp.dtype, num_tables: int, top_k: int) -> str | None:
    """Return what about the tables or this JAX keeps `name` from running, or None."""
    if name == "mosaic_gpu":
        if jax.version.__version_info__ < FIRST_JAX:
            wanted = ".".join(map(str, FIRST_JAX))
            return f"this is JAX {jax.__version__}, the GPU kernels need {wanted} or newer"
        if dtype == jnp.uint32:
            return "packed tables are for TPUs"
        if dim % mosaic_gpu_block.THREADS or dim > mosaic_gpu_block.MAX_DIM:
            most = mosaic_gpu_block.MAX_DIM
            return f"D is {dim}; the GPU kernels take multiples of 128 up to {most}"
        if num_tables * dim * 4 > mosaic_gpu_block.SHARED:
            return f"{num_tables} sums of {dim} entries exceed a processor's shared memory"
        if (top_k + 5) * dim > mosaic_gpu_block.MAX_HELD:
            return f"{top_k} rows of {dim} entries a token exceed the registers of a block"
    if name == "mosaic_tpu":
        if dtype == jnp.bfloat16:
            return "single rows of a bfloat16 table cannot be copied on a TPU; see pack_rows"
        multiple = mosaic_tpu.LANES * (2 if dtype == jnp.uint32 else 1)
        if dim % multiple:
            return f"D is {dim}; the TPU kernels take multiples of {multiple} of such tables"
        if mosaic_tpu.vmem_bytes(mosaic_tpu.BLOCKS[-1], dim, dtype, top_k) > mosaic_tpu.VMEM:
            return f"a block of {top_k} rows of {dim} entries a token exceeds vector memory"
    return None


def _place(name: str, device: _Device) -> str | None:
    """Return what about the device keeps `name` from running, or None."""
    platform = {"mosaic_gpu": "gpu", "mosaic_tpu": "tpu"}.get(name)
    if platform and device.platform != platform:
        return f"the device is a {device.platform}"
    if name == "mosaic_gpu" and not device.kind.startswith(SINCE_HOPPER):
        return f"{device.kind} is not known to have compute capability 9.0 or newer"
    return None


def num_devices() -> int:
    """Return the devices of the mesh that is compiled for, else those there are."""
    return _device().count


def _device() -> _Device:
    mesh = jax.sharding.get_abstract_mesh()
    abstract = mesh.abstract_device
    if abstract:
        return _Device(abstract.platform, abstract.device_kind, mesh.size)
    first = jax.devices()[0]
    return _Device(first.platform, first.device_kind, jax.device_count())
