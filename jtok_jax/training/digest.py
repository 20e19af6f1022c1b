# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Digests of a state, by which a damaged checkpoint is noticed.

Each 32-bit word is hashed with its place and the hashes are added modulo 2^32. The sum is the same
however an array is split. A word that changes always changes it; several at once escape it with a
probability of 2^-32. They are computed where the arrays are: copies to the host are covered too.
"""

import hashlib
import json
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jtok_kernels import mixed
from jtok_kernels.rounding import entry_places

GOLDEN = 0x9E3779B9
PIECE = 16 << 20  # bytes


def digests(leaves: dict[str, jax.Array | np.ndarray]) -> dict[str, int]:
    """Return the digest of every array by its name; waits for them, one after the other.

    Arrays of NumPy are read piece by piece: they may lie in files.
    """
    return {
        name: sum(int(_digest(*part)) for part in _parts(value)) % (1 << 32)
        for name, value in leaves.items()
    }


def text_digest(values: object) -> str:
    """Return the SHA-256 of plain values, as JSON with its keys in order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _parts(value: jax.Array | np.ndarray) -> Iterator[tuple[jax.Array | np.ndarray, np.uint32]]:
    """Yield the parts of an array, each with the place of its first entry."""
    if isinstance(value, jax.Array) or value.nbytes <= PIECE:
        yield value, np.uint32(0)
        return
    rows = max(1, PIECE * len(value) // value.nbytes)
    for row in range(0, len(value), rows):
        yield value[row : row + rows], np.uint32(row * (value.size // len(value)) % (1 << 32))


@jax.jit
def _digest(array: jax.Array, first: jax.Array) -> jax.Array:
    size = array.dtype.itemsize
    words = jax.lax.bitcast_convert_type(array, {2: jnp.uint16, 4: jnp.uint32}[size])
    places = (entry_places(words.shape) + first) * jnp.uint32(GOLDEN)
    return mixed(words.astype(jnp.uint32) ^ places).sum(dtype=jnp.uint32)
