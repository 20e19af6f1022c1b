# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""JTok-M's router (Eq. 10) and its balance loss (App. B), in float32."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

FEW = 16  # tables whose largest logits are found by counting


class Route(NamedTuple):
    """Which tables a token reads, with which weights."""

    choice: jax.Array  # int32 [..., k]
    weights: jax.Array  # float32 [..., k], sum 1
    probabilities: jax.Array  # float32 [..., M], sigmoid of every logit


def route(x_BTD: jax.Array, router_DM: jax.Array, bias_M: jax.Array | None, *, top_k: int) -> Route:
    """Return TopK of g = x^T R, Eq. 10, with w_i = sigmoid(g_i) / sum_j sigmoid(g_j)."""
    logits_BTM = jnp.dot(x_BTD.astype(jnp.float32), router_DM, precision=jax.lax.Precision.HIGHEST)
    if bias_M is not None:
        logits_BTM = logits_BTM + bias_M
    chosen, choice = largest(logits_BTM, top_k)
    weights = jax.nn.softmax(jax.nn.log_sigmoid(chosen), axis=-1)  # the same ratio, no 0/0
    return Route(choice, weights, jax.nn.sigmoid(logits_BTM))


def largest(values: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return the largest `count` values of the last axis and their places, as `lax.top_k` does.

    Of few values each one's rank is counted, which fuses into one kernel where a sort takes two.
    NaN counts as the largest, so that places differ whatever the values are.
    """
    size = values.shape[-1]
    if size > FEW:
        return jax.lax.top_k(values, count)
    place = jnp.arange(size, dtype=jnp.int32)
    rank, nan = jnp.zeros(values.shape, jnp.int32), jnp.isnan(values)
    for other in range(size):
        value, is_nan = values[..., other : other + 1], nan[..., other : other + 1]
        equal = (value == values) | (is_nan & nan)
        rank += (value > values) | (is_nan & ~nan) | (equal & (other < place))
    taken = [rank == k for k in range(count)]
    chosen = [jnp.sum(jnp.where(which, values, 0), axis=-1) for which in taken]
    places = [jnp.sum(jnp.where(which, place, 0), axis=-1) for which in taken]
    return jnp.stack(chosen, axis=-1), jnp.stack(places, axis=-1)


def balance_loss(probabilities: jax.Array, choice: jax.Array, *, probability: str) -> jax.Array:
    """Return n_e * sum_i p_i f_i, App. B, without lambda; over all tokens given.

    p_i is the mean probability of table i, f_i its share of the choices (no gradient).

    Args:
        probability: "sigmoid" as it is, or "normalized" over the n_e tables (open).
    """
    num_tables = probabilities.shape[-1]
    total = {"sigmoid": 1.0, "normalized": probabilities.sum(axis=-1, keepdims=True)}[probability]
    probabilities = probabilities / total
    mean_M = probabilities.reshape(-1, num_tables).mean(axis=0)
    return num_tables * jnp.sum(mean_M * load(choice, num_tables))


def load(choice: jax.Array, count: int) -> jax.Array:
    """Return the share of the choices that fell on each of `count` tables or experts; sums to 1."""
    return jnp.mean(jax.nn.one_hot(choice.reshape(-1), count, dtype=jnp.float32), axis=0)
