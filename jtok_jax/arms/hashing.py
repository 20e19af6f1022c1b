# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Rows of a table by hashed bigrams."""

import jax
import jax.numpy as jnp
from jtok_kernels import mixed


def bigram_rows(ids_BT: jax.Array, rows: int) -> jax.Array:
    """int32 [B, T] in [0, rows) of every id and the one before it; a sequence starts after none."""
    ids = ids_BT.astype(jnp.uint32) + 1
    before = jnp.pad(ids[:, :-1], ((0, 0), (1, 0)))
    return (mixed(ids ^ mixed(before)) % jnp.uint32(rows)).astype(jnp.int32)
