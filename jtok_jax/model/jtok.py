# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""JTok and JTok-M (arXiv 2602.00800): each equation one function, and the parameters they need.

Symbols of the paper: h layer input, h~ after attention, dm increment of the feed-forward, e a row
(or mixture of rows), s the learned scale, g router logits, w mixing weights, N_l backbone layers.
All arithmetic is float32. What the paper leaves open is an argument here and a field of
`JtokConfig`; docs/method.md lists the choices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jtok_jax.config import ModelConfig
from jtok_jax.model.layers import normal, rms_norm

TINY = 1e-30  # keeps the derivative of the root finite at a zero row


def norm_eps(e: jax.Array, *, norm: str, eps: float) -> jax.Array:
    """Norm_eps(e) = e / (|e| + eps), Sec. 3; |e| is the L2 norm, or the RMS for norm="rms".

    Differs from the paper: "rms" (L2 norm / sqrt(D)) is ours; it equals "l2" with s times sqrt(D).
    """
    reduce = {"l2": jnp.sum, "rms": jnp.mean}[norm]
    square = reduce(jnp.square(e), axis=-1, keepdims=True)
    return e / (jnp.sqrt(jnp.maximum(square, TINY)) + eps)


def gate(e_BTD: jax.Array, s_D: jax.Array, *, norm: str, eps: float) -> jax.Array:
    """p = 1 + s * Norm_eps(e), Eq. 7."""
    return 1.0 + s_D * norm_eps(e_BTD, norm=norm, eps=eps)


def apply_gate(dm_BTD: jax.Array, p_BTD: jax.Array) -> jax.Array:
    """dm^ = dm * p, Eq. 8; Eq. 9 adds it to h~. Only the increment is gated, never the stream."""
    return dm_BTD * p_BTD


class Route(NamedTuple):
    """Which tables a token reads, with which weights."""

    choice: jax.Array  # int32 [..., k]
    weights: jax.Array  # float32 [..., k], sum 1
    probabilities: jax.Array  # float32 [..., M], sigmoid of every logit


def route(x_BTD: jax.Array, router_DM: jax.Array, bias_M: jax.Array | None, *, top_k: int) -> Route:
    """g = x^T R, Eq. 10, with x = RMSNorm(h); TopK and w_i = sigmoid(g_i) / sum_j sigmoid(g_j)."""
    logits_BTM = jnp.dot(x_BTD.astype(jnp.float32), router_DM, precision=jax.lax.Precision.HIGHEST)
    if bias_M is not None:
        logits_BTM = logits_BTM + bias_M
    chosen, choice = jax.lax.top_k(logits_BTM, top_k)
    weights = jax.nn.softmax(jax.nn.log_sigmoid(chosen), axis=-1)  # the same ratio, no 0/0
    return Route(choice, weights, jax.nn.sigmoid(logits_BTM))


def mix(rows_BTkD: jax.Array, weights_BTk: jax.Array) -> jax.Array:
    """e = sum_i w_i E_i[x], Eq. 11."""
    return jnp.sum(rows_BTkD * weights_BTk[..., None], axis=-2)


def increment(
    e_BTD: jax.Array, s_D: jax.Array, *, num_layers: int, norm: str, eps: float
) -> jax.Array:
    """dr = 1/sqrt(2 N_l) * s * Norm_eps(e), Eq. 12; Eq. 13 adds it beside dm."""
    return (2 * num_layers) ** -0.5 * s_D * norm_eps(e_BTD, norm=norm, eps=eps)


def balance_loss(probabilities: jax.Array, choice: jax.Array, *, probability: str) -> jax.Array:
    """n_e * sum_i p_i f_i, App. B, without lambda; over all tokens given.

    p_i is the mean probability of table i, f_i its share of the choices (no gradient).

    Args:
        probability: "sigmoid" as it is, or "normalized" over the n_e tables (open).
    """
    num_tables = probabilities.shape[-1]
    if probability == "normalized":
        probabilities = probabilities / probabilities.sum(axis=-1, keepdims=True)
    mean_M = probabilities.reshape(-1, num_tables).mean(axis=0)
    return num_tables * jnp.sum(mean_M * load(choice, num_tables))


def load(choice: jax.Array, count: int) -> jax.Array:
    """Share of the choices that fell on each of `count` tables or experts; sums to 1."""
    return jnp.mean(jax.nn.one_hot(choice.reshape(-1), count, dtype=jnp.float32), axis=0)


class TokenTables(nnx.Module):
    """Parameters of one layer's modulation: the scale s and, for JTok-M, the router."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dim, jtok = config.model_dim, config.jtok
        gated = jtok.kind == "jtok"
        start = jtok.gate_scale_init if gated else jtok.mixture_scale_init
        self.scale = nnx.Param(jnp.full(dim, start, jnp.float32))
        if not gated:
            self.router = normal(rngs, dim, jtok.num_tables, std=jtok.router_init_std)
            if jtok.router_bias:
                self.router_bias = nnx.Param(
                    jnp.full(jtok.num_tables, jtok.router_bias_init, jnp.float32)
                )
            if jtok.router_norm == "own":
                self.router_norm = nnx.Param(jnp.ones(dim, jnp.float32))
        self.config = config

    def route(self, stream_BTD: jax.Array, normed_BTD: jax.Array) -> Route:
        """Route by the stream `h` or `h~`; `normed` is its norm shared with the backbone."""
        jtok, eps = self.config.jtok, self.config.norm_eps
        weight = self.router_norm[...] if jtok.router_norm == "own" else None
        shared = jtok.router_norm == "shared"
        x_BTD = normed_BTD if shared else rms_norm(stream_BTD, weight, eps=eps)
        bias = self.router_bias[...] if jtok.router_bias else None
        return route(x_BTD, self.router[...], bias, top_k=jtok.top_k)
