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

import jax
import jax.numpy as jnp
import numpy as np
from jtok_kernels import mixed

GOLDEN = 0x9E3779B9
PIECE = 16 << 20  # bytes
FOLD = 8  # rows


def digests(leaves: dict[str, jax.Array | np.ndarray]) -> dict[str, int]:
    """Return the digest of every array by its name; waits for them."""
    here = {name: value for name, value in leaves.items() if isinstance(value, np.ndarray)}
    on_devices = {name: value for name, value in leaves.items() if name not in here}
    whole = all(len(value.sharding.device_set) == 1 for value in on_devices.values())
    # One program: CPUs of several processes may wait for each other in one they began out of order.
    found = jax.device_get(_of_devices(on_devices, fold=whole))
    found |= {name: _of_pieces(value) for name, value in here.items()}
    return {name: int(found[name]) for name in leaves}


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


def _of_pieces(value: np.ndarray) -> int:
    """Return the digest of an array that may lie in a file, and be larger than memory."""
    if value.nbytes <= PIECE:
        return piece_digest(value, (0,) * value.ndim, value.shape)
    axis = int(np.argmax(value.strides))  # so that a piece is a run of memory
    length, total = value.shape[axis], 0
    size = max(1, PIECE * length // value.nbytes)
    for first in range(0, length, size):
        part = value[(slice(None),) * axis + (slice(first, first + size),)]
        start = tuple(first if one == axis else 0 for one in range(value.ndim))
        total += piece_digest(part, start, value.shape)
    return total % (1 << 32)


def piece_digest(piece: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """Return what a piece adds to the digest of an array of `shape`, in which it begins at `start`.

    The sum over all pieces, modulo 2^32, is the digest.
    """
    return int(_digest(piece, np.array(start, np.uint32), fold=True, shape=shape))


@functools.partial(jax.jit, static_argnames=("fold", "shape"))
def _digest(array: jax.Array, start: jax.Array, *, fold: bool, shape: tuple[int, ...]) -> jax.Array:
    """Return the digest of a part of an array of `shape`, in which it begins at `start`."""
    word = {2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
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
