# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Norm, rotation and the dense feed-forward; and how every weight starts.

Initial values, as normal(standard deviation):

    norms                               1
    head, projections                   normal(init_std)
    attention out, feed-forward down    normal(init_std / sqrt(2 num_layers))
    embedding                           normal(embed_init_std), or of init_std where that is 0
    tables, routers, scales             as their own fields of the configuration say
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jtok_jax.model.variables import Vector, normal, ones
from jtok_jax.model_config import ModelConfig
from jtok_jax.rope import parse_rope_scaling


def rms_norm(x: jax.Array, weight_D: jax.Array | None, *, eps: float) -> jax.Array:
    """Return x / rms(x) * weight over the last axis, computed in float32, in the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    scaled = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    if weight_D is not None:
        scaled = scaled * weight_D.astype(jnp.float32)
    return scaled.astype(x.dtype)


def layer_norm(x: jax.Array, weight_D=None, bias_D=None, *, eps: float) -> jax.Array:
    """Return (x - mean) / sqrt(variance + eps) * weight + bias, as `rms_norm` does."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    if weight_D is not None:
        scaled = scaled * weight_D + bias_D
    return scaled.astype(x.dtype)


def block_norm(config: ModelConfig) -> Vector | None:
    """Return the weight of a norm in a block; None where it has none."""
    return ones(config.model_dim, "D") if config.block_norm == "rms" else None


def normed(x_BTD: jax.Array, weight: Vector | None, config: ModelConfig) -> jax.Array:
    """Return what the norm of a block makes of `x`; `weight` is that of `block_norm`."""
    if config.block_norm == "weightless_layer":
        return layer_norm(x_BTD, eps=config.norm_eps)
    return rms_norm(x_BTD, None if weight is None else weight[...], eps=config.norm_eps)


class Rotation(NamedTuple):
    """Sine and cosine of every position and frequency, made once for all layers."""

    sin: jax.Array  # float32 [B or 1, T, 1, R/2], of the R entries of a head that turn
    cos: jax.Array


def rotation(positions_BT: jax.Array, config: ModelConfig) -> Rotation:
    """Return the rotation by position * rope_base^(-2i/R), of int32 positions [B, T] or [1, T].

    `rope_scaling` stretches the frequencies.
    """
    half, base = config.rotated_size // 2, config.rope_base
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = parse_rope_scaling(config.rope_scaling)
    if scaling:
        scaled = [scaling.scaled(base ** (-i / half)) for i in range(half)]
        frequencies = jnp.asarray(scaled, jnp.float32)
    angles = positions_BT[..., None, None].astype(jnp.float32) * frequencies
    return Rotation(jnp.sin(angles), jnp.cos(angles))


def rotate(x_BTNH: jax.Array, rope: Rotation) -> jax.Array:
    """Return `x` with the two halves of its first R entries turned by the angle of their position.

    Sums are float32. Halves are cut and joined in the dtype of `x`, or TPUs move float32 halves.
    """
    dtype, half = x_BTNH.dtype, rope.sin.shape[-1]
    first, second, *rest = jnp.split(x_BTNH, list(range(half, x_BTNH.shape[-1], half))[:2], axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = [first * rope.cos - second * rope.sin, second * rope.cos + first * rope.sin]
    return jnp.concatenate([*(part.astype(dtype) for part in turned), *rest], axis=-1)


def swiglu(x_BTD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array) -> jax.Array:
    """Return (silu(x gate) * (x up)) down."""
    dtype = x_BTD.dtype
    gate = _widened(x_BTD, gate_DF.astype(dtype))
    up = _widened(x_BTD, up_DF.astype(dtype))
    return (jax.nn.silu(gate) * up) @ down_FD.astype(dtype)


@jax.custom_vjp
def _widened(x_BTD: jax.Array, weight_DF: jax.Array) -> jax.Array:
    """Return x weight; the weight's gradient is x^T g rather than autodiff's (g^T x)^T.

    The same sums: but XLA on CPUs writes the first factor transposed, and x is the narrower.
    """
    return x_BTD @ weight_DF


def _widened_forward(x_BTD, weight_DF):
    return x_BTD @ weight_DF, (x_BTD, weight_DF)


def _widened_backward(kept, grad_BTF):
    x_BTD, weight_DF = kept
    tokens = tuple(range(x_BTD.ndim - 1))
    weight = jax.lax.dot_general(x_BTD, grad_BTF, ((tokens, tokens), ((), ())))
    return grad_BTF @ weight_DF.T, weight


_widened.defvjp(_widened_forward, _widened_backward)


def residual_std(config: ModelConfig) -> float:
    """Return the standard deviation of a projection that writes to the residual stream."""
    return config.init_std / (2 * config.num_layers) ** 0.5


class FeedForward(nnx.Module):
    """Parameters of the pre-norm SwiGLU."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dim, width, dtype = config.model_dim, config.ffn_dim, config.param_dtype
        self.norm = block_norm(config)
        self.gate = normal(rngs, dim, width, axes="DF", std=config.init_std, dtype=dtype)
        self.up = normal(rngs, dim, width, axes="DF", std=config.init_std, dtype=dtype)
        self.down = normal(rngs, width, dim, axes="FD", std=residual_std(config), dtype=dtype)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        return swiglu(x_BTD, self.gate[...], self.up[...], self.down[...])
