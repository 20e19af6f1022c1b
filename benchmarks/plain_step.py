# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The yardstick: a dense training step by hand, with JAX alone and nothing of this project.

The same decoder as a dense jtok_jax model: pre-norm RMSNorm, rotary, grouped-query causal
attention, SwiGLU, untied head, cross-entropy plus z-loss, clipping by the global norm, AdamW with
decay on matrices. It does what a good hand would: stacked layers under one scan, one matmul for
query, key and value and one for gate and up, angles made once, state donated.

Parameters, a flat dict: embed [V, D], head [D, V], final_norm [D], and by layer (first axis L)
attn_norm [D], qkv [D, (N + 2K) H], out [N H, D], ffn_norm [D], gate_up [D, 2F], down [F, D].
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

TOP = ("embed", "head", "final_norm")  # not stacked by layer


@dataclasses.dataclass(frozen=True)
class Plain:
    """Shapes that the parameters do not tell, and the numbers of the optimizer."""

    heads: int
    kv_heads: int
    head_dim: int
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    z_loss: float = 1e-4
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0
    dtype: str = "float32"  # of matmuls; norms, rotation and loss are float32
    attention: str = "xla"  # or cudnn, which takes bfloat16


class State(NamedTuple):
    count: jax.Array
    params: dict
    mean: dict
    square: dict


def init_state(params: dict) -> State:
    """Takes `params` over: the step will donate them."""
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    return State(jnp.int32(0), params, zeros(), zeros())


def make_step(plain: Plain):
    """Jitted step(state, ids, targets) -> (state, (cross-entropy, gradient norm))."""
    return jax.jit(functools.partial(_step, plain), donate_argnums=0)


def _step(plain: Plain, state: State, ids, targets):
    value_and_grad = jax.value_and_grad(functools.partial(_loss, plain), has_aux=True)
    (_, nats), grads = value_and_grad(state.params, ids, targets)
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in grads.values()))
    clip = jnp.minimum(1.0, plain.clip_norm / norm)
    count = state.count + 1
    fix1, fix2 = 1 - plain.b1**count, 1 - plain.b2**count

    def update(name):
        grad, value = clip * grads[name], state.params[name]
        mean = plain.b1 * state.mean[name] + (1 - plain.b1) * grad
        square = plain.b2 * state.square[name] + (1 - plain.b2) * jnp.square(grad)
        change = (mean / fix1) / (jnp.sqrt(square / fix2) + plain.eps)
        if not name.endswith("norm"):
            change += plain.weight_decay * value
        return value - plain.learning_rate * change, mean, square

    new = {name: update(name) for name in state.params}
    params, mean, square = ({name: new[name][i] for name in new} for i in range(3))
    return State(count, params, mean, square), (nats, norm)


def _loss(plain: Plain, params: dict, ids, targets):
    dtype, (batch, length) = plain.dtype, ids.shape
    half = plain.head_dim // 2
    frequencies = plain.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(length, dtype=jnp.float32)[:, None, None] * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    query_dim, kv_dim = plain.heads * plain.head_dim, plain.kv_heads * plain.head_dim

    def rotate(x):
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(dtype)

    def norm(x, weight):
        x = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + plain.norm_eps)
        return (x * inverse * weight).astype(dtype)

    def layer(x, w):
        qkv = norm(x, w["attn_norm"]) @ w["qkv"].astype(dtype)
        split = jnp.split(qkv, [query_dim, query_dim + kv_dim], axis=-1)
        q, k, v = (part.reshape(batch, length, -1, plain.head_dim) for part in split)
        mixed = jax.nn.dot_product_attention(
            rotate(q), rotate(k), v, is_causal=True, implementation=plain.attention
        )
        x = x + mixed.reshape(batch, length, -1) @ w["out"].astype(dtype)
        gate, up = jnp.split(norm(x, w["ffn_norm"]) @ w["gate_up"].astype(dtype), 2, axis=-1)
        return x + (jax.nn.silu(gate) * up) @ w["down"].astype(dtype), None

    layers = {name: value for name, value in params.items() if name not in TOP}
    x, _ = jax.lax.scan(layer, params["embed"][ids].astype(dtype), layers)
    x = norm(x, params["final_norm"]).reshape(batch * length, -1)
    head, flat = params["head"].astype(dtype), targets.reshape(-1)
    logits = jnp.dot(x, head, preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    # The target's logit from its column of the head: no gather and scatter of [tokens, V].
    target = jnp.einsum("RD,RD->R", x, head.T[flat], preferred_element_type=jnp.float32)
    nats = jnp.mean(lse - target)
    return nats + plain.z_loss * jnp.mean(jnp.square(lse)), nats
