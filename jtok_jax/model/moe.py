# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Mixture-of-experts feed-forward: softmax router, top-k, shared expert, no token dropped."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jtok_jax.config import ModelConfig
from jtok_jax.model.grouped_matmul import grouped_matmul
from jtok_jax.model.layers import normal, residual_std, swiglu


class ExpertRoute(NamedTuple):
    """Which experts a token uses, with which weights."""

    choice_Rk: jax.Array  # int32
    weights_Rk: jax.Array  # float32
    probabilities_RE: jax.Array  # float32, sum 1


def route(x_RD: jax.Array, router_DE: jax.Array, *, top_k: int, renormalize: bool) -> ExpertRoute:
    """Softmax over all experts in float32, then the top k."""
    logits_RE = jnp.dot(x_RD.astype(jnp.float32), router_DE, precision=jax.lax.Precision.HIGHEST)
    probabilities_RE = jax.nn.softmax(logits_RE, axis=-1)
    weights_Rk, choice_Rk = jax.lax.top_k(probabilities_RE, top_k)
    if renormalize:
        weights_Rk = weights_Rk / weights_Rk.sum(axis=-1, keepdims=True)
    return ExpertRoute(choice_Rk, weights_Rk, probabilities_RE)


def balance_loss(route: ExpertRoute) -> jax.Array:
    """E * sum_e f_e P_e: share of the choices times mean probability (Switch, arXiv 2101.03961)."""
    num_experts = route.probabilities_RE.shape[-1]
    counts_E = jnp.bincount(route.choice_Rk.reshape(-1), length=num_experts)
    share_E = counts_E.astype(jnp.float32) / route.choice_Rk.size
    return num_experts * jnp.sum(share_E * route.probabilities_RE.mean(axis=0))


def experts(
    x_RD: jax.Array, route: ExpertRoute, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array
) -> jax.Array:
    """Weighted sum of the chosen experts' SwiGLU of every token, [R, D].

    1. sort the (token, choice) pairs by expert  2. three grouped matmuls over the sorted rows
    3. put the rows back in order                4. weigh and add the k rows of a token.
    """
    dtype, (num_rows, top_k) = x_RD.dtype, route.choice_Rk.shape
    flat = route.choice_Rk.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes_E = jnp.bincount(flat, length=gate_EDF.shape[0]).astype(jnp.int32)
    sorted_x = x_RD[order // top_k]
    hidden = jax.nn.silu(grouped_matmul(sorted_x, gate_EDF.astype(dtype), sizes_E))
    hidden = hidden * grouped_matmul(sorted_x, up_EDF.astype(dtype), sizes_E)
    sorted_out = grouped_matmul(hidden, down_EFD.astype(dtype), sizes_E)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True)
    out_RkD = sorted_out[place].reshape(num_rows, top_k, -1)
    mixed = jnp.einsum("RkD,Rk->RD", out_RkD, route.weights_Rk, preferred_element_type=jnp.float32)
    return mixed.astype(dtype)


class MoeResult(NamedTuple):
    """Output of the experts and the balance loss of their router."""

    out_BTD: jax.Array
    balance: jax.Array


class Moe(nnx.Module):
    """Parameters of the pre-norm mixture of experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        moe, dim, dtype = config.moe, config.model_dim, config.param_dtype
        count, width, shared = moe.num_experts, moe.expert_dim, moe.shared_dim
        std, out_std = config.init_std, residual_std(config)
        self.norm = nnx.Param(jnp.ones(dim, dtype))
        self.router = normal(rngs, dim, count, std=moe.router_init_std)
        self.gate = normal(rngs, count, dim, width, std=std, dtype=dtype)
        self.up = normal(rngs, count, dim, width, std=std, dtype=dtype)
        self.down = normal(rngs, count, width, dim, std=out_std, dtype=dtype)
        if shared:
            self.shared_gate = normal(rngs, dim, shared, std=std, dtype=dtype)
            self.shared_up = normal(rngs, dim, shared, std=std, dtype=dtype)
            self.shared_down = normal(rngs, shared, dim, std=out_std, dtype=dtype)
        self.config = moe

    def __call__(self, x_BTD: jax.Array) -> MoeResult:
        config = self.config
        x_RD = x_BTD.reshape(-1, x_BTD.shape[-1])
        chosen = route(x_RD, self.router[...], top_k=config.top_k, renormalize=config.renormalize)
        out_RD = experts(x_RD, chosen, self.gate[...], self.up[...], self.down[...])
        out_BTD = out_RD.reshape(x_BTD.shape)
        if config.shared_dim:
            out_BTD = out_BTD + swiglu(
                x_BTD, self.shared_gate[...], self.shared_up[...], self.shared_down[...]
            )
        return MoeResult(out_BTD, balance_loss(chosen))
