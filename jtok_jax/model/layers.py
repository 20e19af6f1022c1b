# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Norm, rotation and the dense feed-forward; and how every weight starts.

Initial values: norms 1; embedding, head and projections normal(init_std), those projections that
write to the residual stream (attention out, feed-forward down) divided by sqrt(2 num_layers);
tables, routers and scales as their own config fields say.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jtok_jax.config import ModelConfig


def rms_norm(x: jax.Array, weight_D: jax.Array | None, *, eps: float) -> jax.Array:
    """x / rms(x) * weight over the last axis, computed in float32, in the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    scaled = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    if weight_D is not None:
        scaled = scaled * weight_D.astype(jnp.float32)
    return scaled.astype(x.dtype)


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, *, base: float) -> jax.Array:
    """Rotary embedding: the two halves of H turn by position * base^(-2i/H)."""
    half = x_BTNH.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


def swiglu(x_BTD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array) -> jax.Array:
    """(silu(x gate) * (x up)) down."""
    dtype = x_BTD.dtype
    gate = x_BTD @ gate_DF.astype(dtype)
    up = x_BTD @ up_DF.astype(dtype)
    return (jax.nn.silu(gate) * up) @ down_FD.astype(dtype)


def normal(rngs: nnx.Rngs, *shape: int, std: float, dtype: str = "float32") -> nnx.Param[jax.Array]:
    """A parameter drawn from normal(0, std)."""
    return nnx.Param((std * jax.random.normal(rngs.params(), shape)).astype(dtype))


def residual_std(config: ModelConfig) -> float:
    """Standard deviation of a projection that writes to the residual stream."""
    return config.init_std / (2 * config.num_layers) ** 0.5


class FeedForward(nnx.Module):
    """Parameters of the pre-norm SwiGLU."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dim, width, dtype = config.model_dim, config.ffn_dim, config.param_dtype
        self.norm = nnx.Param(jnp.ones(dim, dtype))
        self.gate = normal(rngs, dim, width, std=config.init_std, dtype=dtype)
        self.up = normal(rngs, dim, width, std=config.init_std, dtype=dtype)
        self.down = normal(rngs, width, dim, std=residual_std(config), dtype=dtype)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return swiglu(x_BTD, self.gate[...], self.up[...], self.down[...])
