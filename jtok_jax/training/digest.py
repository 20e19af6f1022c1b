# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Digests of a state, by which a damaged checkpoint is noticed.

Each 32-bit word is hashed with its place and the hashes are added modulo 2^32. The sum is the same
however an array is split. A word that changes always changes it; several at once escape it with a
probability of 2^-32. They are computed where the arrays are: copies to the host are covered too.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jtok_kernels import mixed

from jtok_jax.errors import CheckpointError
from jtok_jax.store.part import Region, of_all_processes
from jtok_jax.store.pieces import Pieces

GOLDEN = 0x9E3779B9
FOLD = 8  # rows


def digests(leaves: Mapping[str, jax.Array | Pieces]) -> dict[str, int]:
    """Return the digest of every array by its name; waits for them. All processes call this.

    Raises CheckpointError: processes have different copies of one.
    """
    in_pieces = {name: value for name, value in leaves.items() if isinstance(value, Pieces)}
    on_devices = {name: value for name, value in leaves.items() if name not in in_pieces}
    whole = all(len(value.sharding.device_set) == 1 for value in on_devices.values())
    # One program: CPUs of several processes may wait for each other in one they began out of order.
    found = jax.device_get(_of_devices(on_devices, fold=whole))
    found |= digests_of_regions({name: _by_region(value) for name, value in in_pieces.items()})
    return {name: int(found[name]) for name in leaves}


def digests_of_regions(regions: Mapping[str, Mapping[Region, int | None]]) -> dict[str, int]:
    """Return the digest of every array from those of its regions, None where others have one.

    All processes call this, with the same regions. Raises CheckpointError: copies of one differ.
    """
    if not regions:
        return {}
    own = [value for one in regions.values() for value in one.values()]
    own = np.array([(value or 0, value is not None) for value in own], np.uint32).reshape(-1, 2)
    values, here = np.moveaxis(of_all_processes(own), 2, 0)
    largest = np.where(here, values, 0).max(axis=0, initial=0)
    owners = np.repeat(list(regions), [len(one) for one in regions.values()])
    differs = np.any(here.astype(bool) & (values != largest), axis=0)
    if differs.any():
        raise CheckpointError(
            f"Processes have different copies of {', '.join(sorted(set(owners[differs])))}. "
            "Nothing was saved or loaded, and earlier checkpoints are intact: start all processes "
            "again. If it comes back, try another host."
        )
    return {name: int(largest[owners == name].sum(dtype=np.uint64)) % (1 << 32) for name in regions}


def text_digest(values: object) -> str:
    """Return the SHA-256 of plain values, as JSON with its keys in order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@functools.partial(jax.jit, static_argnames="fold")
def _of_devices(leaves: dict[str, jax.Array], *, fold: bool) -> dict[str, jax.Array]:
    """fold: no rows that would be added lie on several devices."""
    start = lambda value: jnp.zeros(value.ndim, jnp.uint32)
    return {
        name: _digest(value, start(value), fold=fold, shape=value.shape)
        for name, value in leaves.items()
    }


def _by_region(value: Pieces) -> dict[Region, int | None]:
    """Return the digest of every region of an array, None where another process has it."""
    found = {}
    for region, array in value.regions.items():
        parts = [] if array is None else value.split(region)
        total = sum(piece_digest(part, start, value.shape) for start, part in parts)
        found[region] = None if array is None else total % (1 << 32)
    return found


def piece_digest(piece: np.ndarray, start: Sequence[int], shape: tuple[int, ...]) -> int:
    """Return what a piece adds to the digest of an array of `shape`, in which it begins at `start`.

    The sum over all pieces, modulo 2^32, is the digest.
    """
    return int(_digest(piece, np.array(start, np.uint32), fold=True, shape=shape))


@functools.partial(jax.jit, static_argnames=("fold", "shape"))
def _digest(array: jax.Array, start: jax.Array, *, fold: bool, shape: tuple[int, ...]) -> jax.Array:
    """Return the digest of a part of an array of `shape`, in which it begins at `start`."""
    word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(array, word)
    places = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        places = places * jnp.uint32(size) + along + start[axis]
    hashed = mixed(words.astype(jnp.uint32) ^ (places * jnp.uint32(GOLDEN)))
    # XLA for CPUs adds arrays by vectors, but to a sum one number at a time: 5 times slower.
    if fold and array.ndim > 1 and array.shape[-2] % FOLD == 0:
        hashed = hashed.reshape(-1, FOLD, array.shape[-1])
        hashed = sum(hashed[:, row] for row in range(FOLD))
    return hashed.sum(dtype=jnp.uint32)
