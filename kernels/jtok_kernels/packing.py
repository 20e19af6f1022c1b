# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""bfloat16 tables as 32-bit words, for chips that cannot copy a single row of 16-bit entries.

On a TPU a [V, D] array of bfloat16 is stored in tiles of several rows. Of 32-bit words single rows
can be copied. A word holds entry c of a row in its low half and entry c + D / 2 in its high half:
unpacking moves nothing between lanes. Everything else sees logical tables.
"""

import jax
import jax.numpy as jnp

HIGH = 0xFFFF0000


def pack_rows(table: jax.Array) -> jax.Array:
    """Return uint32 [..., V, D / 2] of a bfloat16 table [..., V, D], D even; bit for bit.

    Raises:
        ValueError: another dtype, or an odd D.
    """
    if table.dtype != jnp.bfloat16 or table.shape[-1] % 2:
        raise ValueError(f"table is {table.dtype} {table.shape}; expected bfloat16 of an even D.")
    low, high = jnp.split(jax.lax.bitcast_convert_type(table, jnp.uint16).astype(jnp.uint32), 2, -1)
    return low | (high << 16)


def unpack_rows(packed: jax.Array) -> jax.Array:
    """Return the bfloat16 table [..., V, D] of `pack_rows`."""
    return as_float(packed).astype(jnp.bfloat16)


def as_float(rows: jax.Array) -> jax.Array:
    """Return rows of a table of any kind as float32 [..., D]."""
    if rows.dtype != jnp.uint32:
        return rows.astype(jnp.float32)
    return jnp.concatenate(halves(rows), axis=-1)


def halves(words: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (entries 0 to D / 2, entries D / 2 to D) of packed rows, as float32."""
    as_f32 = lambda bits: jax.lax.bitcast_convert_type(bits, jnp.float32)
    return as_f32(words << 16), as_f32(words & jnp.uint32(HIGH))


def width(table: jax.Array) -> int:
    """Return D of a table of any kind."""
    return table.shape[-1] * (2 if table.dtype == jnp.uint32 else 1)
