# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Choosing the next token: temperature, top-k, top-p."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """How tokens are drawn; all may change without compiling again."""

    temperature: float = 1.0  # 0: always the most likely token
    top_k: int = 0  # only the k most likely; 0: all
    top_p: float = 1.0  # only the smallest set of most likely tokens with this probability


def sample(logits_BV: jax.Array, key: jax.Array, options: Sampling) -> jax.Array:
    """One int32 id per sequence.

    Limits act on the probabilities after the temperature; the most likely token always stays.
    """
    greedy_B = jnp.argmax(logits_BV, axis=-1)
    temperature = jnp.maximum(options.temperature, 1e-6)
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1) / temperature
    before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1) - jax.nn.softmax(sorted_BV)
    rank_V = jnp.arange(logits_BV.shape[-1])
    limit = jnp.where(options.top_k > 0, options.top_k, rank_V.size)
    keep_BV = ((rank_V < limit) & (before_BV < options.top_p)) | (rank_V == 0)
    drawn_B = jax.random.categorical(key, jnp.where(keep_BV, sorted_BV, -jnp.inf), axis=-1)
    drawn_B = jnp.take_along_axis(order_BV, drawn_B[:, None], axis=-1)[:, 0]
    return jnp.where(options.temperature > 0, drawn_B, greedy_B).astype(jnp.int32)
