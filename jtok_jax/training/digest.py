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
    return {name: _digest(value, jnp.uint32(0), fold=fold) for name, value in leaves.items()}


def _of_pieces(value: np.ndarray) -> int:
    """Return the digest of an array that may lie in a file, and be larger than memory."""
    if value.nbytes <= PIECE:
        return int(_digest(value, np.uint32(0), fold=True))
    axis = int(np.argmax(value.strides))  # so that a piece is a run of memory
    length, total = value.shape[axis], 0
    size = max(1, PIECE * length // value.nbytes)
    for first in range(0, length, size):
        part = value[(slice(None),) * axis + (slice(first, first + size),)]
        total += piece_digest(part, first, axis=axis, length=length)
    return total % (1 << 32)


def piece_digest(piece: np.ndarray, first: int, *, axis: int, length: int) -> int:
    """Return what a piece adds to the digest of an array of `length` along `axis`.

    first: where it begins there. The sum over all pieces, modulo 2^32, is the digest.
    """
    return int(_digest(piece, np.uint32(first), fold=True, axis=axis, length=length))


@functools.partial(jax.jit, static_argnames=("fold", "axis", "length"))
def _digest(
    array: jax.Array, first: jax.Array, *, fold: bool, axis: int = 0, length: int | None = None
) -> jax.Array:
    """Return the digest of a part of an array, which begins at `first` of `length` along `axis`."""
    word = {2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    words = jax.lax.bitcast_convert_type(array, word)
    places = jnp.zeros(array.shape, jnp.uint32)
    for one, size in enumerate(array.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, array.shape, one)
        own = one == axis
        places = places * jnp.uint32(length if own and length else size) + along + first * own
    hashed = mixed(words.astype(jnp.uint32) ^ (places * jnp.uint32(GOLDEN)))
    # XLA for CPUs adds arrays by vectors, but to a sum one number at a time: 5 times slower.
    if fold and array.ndim > 1 and array.shape[-2] % FOLD == 0:
        hashed = hashed.reshape(-1, FOLD, array.shape[-1])
        hashed = sum(hashed[:, row] for row in range(FOLD))
    return hashed.sum(dtype=jnp.uint32)
