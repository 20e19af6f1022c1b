# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Digests of a state, by which a damaged checkpoint is noticed.

Each 32-bit word is hashed with its place and the hashes are added modulo 2^32. The sum is the same
however an array is split. A word that changes always changes it; several at once escape it with a
probability of 2^-32. They are computed where the arrays are: copies to the host are covered too.
"""

import hashlib
import json

import jax
import jax.numpy as jnp
from jtok_kernels import mixed
from jtok_kernels.rounding import entry_places

GOLDEN = 0x9E3779B9


def digests(leaves: dict[str, jax.Array]) -> dict[str, int]:
    """Return the digest of every array by its name; waits for them, one after the other."""
    return {name: int(_digest(value)) for name, value in leaves.items()}


def text_digest(values: object) -> str:
    """Return the SHA-256 of plain values, as JSON with its keys in order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@jax.jit
def _digest(array: jax.Array) -> jax.Array:
    size = array.dtype.itemsize
    words = jax.lax.bitcast_convert_type(array, {2: jnp.uint16, 4: jnp.uint32}[size])
    places = entry_places(words.shape) * jnp.uint32(GOLDEN)
    return mixed(words.astype(jnp.uint32) ^ places).sum(dtype=jnp.uint32)
