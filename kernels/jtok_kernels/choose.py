# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Which implementation runs: the one asked for, or an error; None is chosen by platform."""

import functools
import logging
from typing import NamedTuple

import jax

from jtok_kernels import mosaic_gpu, xla

IMPLEMENTATIONS = ("xla", "mosaic_gpu")
INTERPRETED = "mosaic_gpu:interpret"  # the kernel simulated on a CPU, with races detected: slow
FIRST_JAX = (0, 11, 1)  # of the Mosaic GPU interface used here
NEWER_THAN_HOPPER = ("NVIDIA H", "NVIDIA GH", "NVIDIA B", "NVIDIA GB")


class Choice(NamedTuple):
    name: str
    reason: str


class _Device(NamedTuple):
    platform: str
    kind: str
    count: int


def choose(implementation: str | None, *, dim: int) -> Choice:
    """The implementation for rows of `dim` entries, and why.

    The device is that of an abstract mesh in use (as when compiling ahead of time), else the
    default one.

    Raises:
        ValueError: the implementation asked for does not exist or cannot run there.
    """
    if implementation == "xla":
        return Choice("xla", "asked for")
    device = _device()
    if implementation is None:
        obstacle = _obstacle(device, dim) or _several(device)
        if obstacle:
            return _logged(Choice("xla", obstacle))
        return _logged(Choice("mosaic_gpu", f"the device is {device.kind}"))
    obstacle = _version() or _width(dim) if implementation == INTERPRETED else None
    if implementation == "mosaic_gpu":
        obstacle = _obstacle(device, dim)
    elif implementation != INTERPRETED:
        known = ", ".join((*IMPLEMENTATIONS, INTERPRETED))
        raise ValueError(f"implementation is {implementation!r}; expected one of {known}.")
    if obstacle:
        raise ValueError(f"implementation {implementation!r} cannot run: {obstacle}; 'xla' can.")
    return Choice(implementation, "asked for")


def backend(name: str):
    """The functions of an implementation."""
    if name == "xla":
        return xla
    return mosaic_gpu.MosaicGpu(name == INTERPRETED)


def _obstacle(device: _Device, dim: int) -> str | None:
    """What keeps the GPU kernels from running, or None."""
    if device.platform != "gpu":
        return f"{device.platform} has no kernel of ours yet"
    if not device.kind.startswith(NEWER_THAN_HOPPER):
        return f"{device.kind} is older than compute capability 9.0"
    return _version() or _width(dim)


def _version() -> str | None:
    if jax.version.__version_info__ < FIRST_JAX:
        wanted = ".".join(map(str, FIRST_JAX))
        return f"this is JAX {jax.__version__}, the kernels need {wanted} or newer"
    return None


def _width(dim: int) -> str | None:
    if dim % mosaic_gpu.THREADS or dim > mosaic_gpu.MAX_DIM:
        return (
            f"rows have {dim} entries, the kernels take multiples of {mosaic_gpu.THREADS} "
            f"up to {mosaic_gpu.MAX_DIM}"
        )
    return None


def _several(device: _Device) -> str | None:
    if device.count > 1:
        return f"there are {device.count} devices, over which XLA can split its own code alone"
    return None


def _device() -> _Device:
    mesh = jax.sharding.get_abstract_mesh()
    abstract = None if mesh.empty else getattr(mesh, "abstract_device", None)
    if abstract is not None:
        return _Device(getattr(abstract, "platform", "gpu"), abstract.device_kind, mesh.size)
    first = jax.devices()[0]
    return _Device(first.platform, first.device_kind, jax.device_count())


@functools.cache
def _logged(choice: Choice) -> Choice:
    logging.getLogger("jtok_kernels").info("table operations: %s (%s)", *choice)
    return choice
