# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Rounding: that no compiler leaves out, and to bfloat16 at random, alike in XLA and in kernels.

At random by a hash of the entry's place: a counter-based generator of a library would cost more
than the update, some 100 operations a word. Rounding needs 16 bits that are uniform and do not
repeat from step to step, no more.
"""

import jax
import jax.numpy as jnp
import numpy as np

Seed = jax.Array  # uint32 [2], of a step


@jax.custom_jvp
def rounded(products: jax.Array) -> jax.Array:
    """Return the float32 products themselves, which no compiler can fuse with the sum that follows.

    Whether it would (multiply-add rounds once) depends on the shape of a loop, and so on how tables
    are split: rounded products summed in order have the same bits in every layout. As words their
    minimum with the last word but one changes nothing but one of the NaNs, to another.
    """
    words = jax.lax.bitcast_convert_type(products, jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.minimum(words, 0x7FFFFFFE), jnp.float32)


@rounded.defjvp
def _rounded_jvp(products, tangents):
    return rounded(*products), *tangents


def row_seeds(seed: Seed, number, ids):
    """Return uint32 of every row, from the number of its table and its id (int32, any shapes)."""
    word = lambda x: jnp.asarray(x).astype(jnp.uint32)
    return mixed(mixed(mixed(seed[0] + word(number)) ^ seed[1]) + word(ids))


def key_of_part(key: jax.Array, first_table) -> jax.Array:
    """Return a key by which tables of a stack round as in the whole, from this number on."""
    data = jax.random.key_data(key)
    data = data.at[0].add(jnp.asarray(first_table).astype(jnp.uint32))
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def round_at_random(x: jax.Array, row_seed, entries: jax.Array) -> jax.Array:
    """Return bfloat16, away from zero with the probability of what is cut off, else towards it.

    Args:
        row_seed: uint32, broadcast to `entries`.
        entries: uint32, place of every entry in its row, shape of x or broadcast to it.
    """
    cut = mixed(row_seed + entries * jnp.uint32(0x9E3779B9)) >> 16
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + cut
    raised = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.abs(x) < jnp.inf, raised, x).astype(jnp.bfloat16)


def entry_places(shape: tuple[int, ...]) -> jax.Array:
    """Return uint32 of `shape`: the place of every entry, row-major, modulo 2^32."""
    places = jnp.zeros(shape, jnp.uint32)
    for axis, length in enumerate(shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        places = places * jnp.uint32(length) + along
    return places


def mixed(x):
    """Return the finalizer of MurmurHash3 of uint32: every bit in changes every bit out.

    Of an array of NumPy it is one of NumPy.
    """
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
