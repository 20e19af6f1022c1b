# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Says what the operations compute: each equation of arXiv 2602.00800 one function, in float32.

Symbols of the paper: h the stream after attention, dm (`delta`) the increment of the feed-forward,
e a row or a mixture of rows, s the learned scale, w mixing weights, N_l layers of the backbone.
"""

import jax
import jax.numpy as jnp

from jtok_kernels.rounding import rounded

NORMS = ("l2", "rms")
TINY = 1e-30  # keeps the derivative of the root finite at a zero row


def norm_eps(e: jax.Array, *, norm: str, eps: float) -> jax.Array:
    """Return Norm_eps(e) = e / (|e| + eps), Sec. 3; |e| is the L2 norm, or the RMS for norm="rms".

    Differs from the paper: "rms" (L2 norm / sqrt(D)) is ours; it equals "l2" with s times sqrt(D).
    """
    reduce = {"l2": jnp.sum, "rms": jnp.mean}[norm]
    square = reduce(rounded(jnp.square(e)), axis=-1, keepdims=True)
    return e / (jnp.sqrt(jnp.maximum(square, TINY)) + eps)


def gate(e: jax.Array, s_D: jax.Array, *, norm: str, eps: float) -> jax.Array:
    """Return p = 1 + s * Norm_eps(e), Eq. 7."""
    return 1.0 + s_D * norm_eps(e, norm=norm, eps=eps)


def mix(rows_TKD: jax.Array, weights_TK: jax.Array) -> jax.Array:
    """Return e = sum_i w_i E_i[x], Eq. 11."""
    return jnp.sum(rows_TKD * weights_TK[..., None], axis=-2)


def injection(
    e: jax.Array, s_D: jax.Array, *, depth_scale: float, norm: str, eps: float
) -> jax.Array:
    """Return dr = 1/sqrt(2 N_l) * s * Norm_eps(e), Eq. 12, with depth_scale = 1/sqrt(2 N_l)."""
    return depth_scale * s_D * norm_eps(e, norm=norm, eps=eps)


def add_gated(h: jax.Array, delta: jax.Array, p: jax.Array) -> jax.Array:
    """Return h' = h + dm * p, Eq. 8 and 9: the increment is gated, never the stream.

    The product is rounded to the stream's dtype before it is added, so that p = 1 gives the
    backbone's own bits.
    """
    return h + (delta.astype(jnp.float32) * p).astype(h.dtype)


def add_injected(h: jax.Array, delta: jax.Array, dr: jax.Array) -> jax.Array:
    """Return h' = h + dm + dr, Eq. 13, rounded as in `add_gated`."""
    return h + delta + dr.astype(h.dtype)


def norm_add(
    h: jax.Array,
    delta: jax.Array,
    e: jax.Array,
    scale_D: jax.Array,
    *,
    depth_scale: float | None,
    norm: str,
    eps: float,
) -> jax.Array:
    """Return JTok's gate with depth_scale None, else JTok-M's injection, from rows already here."""
    if depth_scale is None:
        return add_gated(h, delta, gate(e, scale_D, norm=norm, eps=eps))
    dr = injection(e, scale_D, depth_scale=depth_scale, norm=norm, eps=eps)
    return add_injected(h, delta, dr)
