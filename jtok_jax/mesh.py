# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The device mesh, and the one table that says which axis letter is split over which mesh axis."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jtok_jax.config import MeshConfig
from jtok_jax.errors import ConfigError

# Every matrix has one D. Splitting tables by column keeps lookups balanced whatever the ids are.
MESH_AXES = {"B": ("data", "fsdp"), "D": "fsdp"}


def make_mesh(config: MeshConfig) -> Mesh:
    """Mesh (data, fsdp) over all devices; one device is a mesh of ones.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    data = devices // config.fsdp if config.data == -1 else config.data
    if data * config.fsdp != devices:
        raise ConfigError(
            f"mesh.data x mesh.fsdp is {data} x {config.fsdp} but there are {devices} devices; "
            "set mesh.fsdp to a divisor of that number and mesh.data to -1."
        )
    shape, names = (data, config.fsdp), ("data", "fsdp")
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def sharding(mesh: Mesh, letters: str, shape: tuple[int, ...]) -> NamedSharding:
    """Sharding of an array with axis `letters`; an axis that does not divide stays whole.

    Raises:
        ValueError: two axes of the array ask for the same mesh axis.
    """
    axes = [
        MESH_AXES.get(letter) if _divides(mesh, letter, size) else None
        for letter, size in zip(letters, shape, strict=True)
    ]
    used = [name for axis in axes if axis for name in ([axis] if isinstance(axis, str) else axis)]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {letters} use a mesh axis twice: {axes}")
    return NamedSharding(mesh, PartitionSpec(*axes))


def check_batch(mesh: Mesh, name: str, size: int) -> None:
    """Refuse a batch that the devices cannot share evenly."""
    if size % mesh.size:
        raise ConfigError(
            f"{name} is {size}; expected a multiple of the {mesh.size} devices that share it."
        )


def split_batch(mesh: Mesh) -> NamedSharding:
    """First axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(MESH_AXES["B"]))


def put_batch(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """The batch on the devices, split along its first axis."""
    return jax.device_put(array, split_batch(mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _divides(mesh: Mesh, letter: str, size: int) -> bool:
    axis = MESH_AXES.get(letter, ())
    names = (axis,) if isinstance(axis, str) else axis
    return size % int(np.prod([mesh.shape[name] for name in names])) == 0
