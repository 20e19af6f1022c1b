# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Choosing the next token: temperature, top-k, top-p. Nothing sorts the vocabulary."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jtok_jax.errors import ConfigError

BLOCK = 128  # ids whose weights are summed before one of them is searched


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; both limits act on all ids' probabilities after the temperature.

    `temperature` and `top_p` may change without compiling again, if they are not neutral before or
    after.
    """

    temperature: float | None = 1.0  # 0 or None: always the most likely token
    top_k: int = dataclasses.field(default=0, metadata={"static": True})  # of the most likely; 0: V
    top_p: float | None = 1.0  # only the most likely tokens with this probability; 1 or None: all

    def check(self) -> None:
        """Raise ConfigError where an option is impossible."""
        top_p = 1.0 if self.top_p is None else self.top_p
        for name, is_sound, expected in (
            ("temperature", 0 <= (self.temperature or 0) < math.inf, "a finite number from 0 on"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < top_p <= 1, "more than 0 and at most 1"),
        ):
            if not is_sound:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected {expected}.")

    def without_neutral(self, vocab_size: int) -> "Sampling":
        """Return options of the same meaning in which what changes nothing is 0 or None."""
        if not self.temperature:
            return Sampling(None, 0, None)
        top_k = self.top_k if self.top_k < vocab_size else 0
        return Sampling(self.temperature, top_k, None if self.top_p == 1 else self.top_p)


def sample(logits_BV: jax.Array, keys_B: jax.Array, options: Sampling) -> jax.Array:
    """Return one int32 id per sequence, each drawn with a random key of its own.

    Top-k of equally likely tokens takes the lower ids. Top-p takes all tokens as likely as the last
    one that it needs, so at least one. `options` are those of `Sampling.without_neutral`.
    """
    if options.temperature is None:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    most_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    logits_BV = (logits_BV - most_B1) / jnp.maximum(options.temperature, 1e-6)
    whole_B = jnp.exp(logits_BV).sum(axis=-1)
    ids_Bk = None
    if options.top_k:
        logits_BV, ids_Bk = jax.lax.top_k(logits_BV, options.top_k)
    weights_BV = jnp.exp(logits_BV)  # at most 1
    if options.top_p is not None:
        weights_BV = _most_likely(weights_BV, options.top_p * whole_B)
    drawn_B = _draw(weights_BV, keys_B)
    if ids_Bk is not None:
        drawn_B = jnp.take_along_axis(ids_Bk, drawn_B[:, None], axis=-1)[:, 0]
    return drawn_B.astype(jnp.int32)


def _most_likely(weights_BV: jax.Array, wanted_B: jax.Array) -> jax.Array:
    """Return weights of the smallest set that sums to `wanted`, zeros elsewhere; all if none does.

    The least weight of the set is found by bisection. Floats of at least 0 have the order of their
    bits, so 30 halvings reach neighbours: the limit is exact.
    """
    bits_BV = jax.lax.bitcast_convert_type(weights_BV, jnp.int32)
    least, beyond = [jax.lax.bitcast_convert_type(jnp.float32(x), jnp.int32) for x in (0, 1)]

    def halve(_, bounds):
        low_B, high_B = bounds  # the set from `low` on is enough, that from `high` on is not
        middle_B = (low_B + high_B) // 2
        sums_B = jnp.where(bits_BV >= middle_B[:, None], weights_BV, 0).sum(axis=-1)
        enough_B = sums_B >= wanted_B
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    start = jnp.full_like(bits_BV[:, 0], least), jnp.full_like(bits_BV[:, 0], beyond + 1)
    low_B, _ = jax.lax.fori_loop(0, 30, halve, start)
    return jnp.where(bits_BV >= low_B[:, None], weights_BV, 0)


def _draw(weights_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """Return an index by weight: first a block of `BLOCK` by its sum, then one of the block.

    That takes two random numbers a sequence, not one an id.
    """
    batch, size = weights_BV.shape
    shares_2B = jax.vmap(lambda key: jax.random.uniform(key, (2,)), out_axes=1)(keys_B)
    blocks = jnp.pad(weights_BV, ((0, 0), (0, -size % BLOCK))).reshape(batch, -1, BLOCK)
    block_B = _search(blocks.sum(axis=-1), shares_2B[0])
    chosen = jnp.take_along_axis(blocks, block_B[:, None, None], axis=1)[:, 0]
    return block_B * BLOCK + _search(chosen, shares_2B[1])


def _search(weights_BN: jax.Array, share_B: jax.Array) -> jax.Array:
    """Return the first index whose running sum exceeds a share of the whole; it has a weight."""
    running_BN = jnp.cumsum(weights_BN, axis=-1)
    whole_B = running_BN[:, -1]
    target_B = jnp.minimum(share_B * whole_B, jnp.nextafter(whole_B, 0))  # rounding may reach it
    return jnp.argmax(running_BN > target_B[:, None], axis=-1)
