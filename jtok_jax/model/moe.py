# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Mixture-of-experts feed-forward: softmax router, top-k, shared expert, no token dropped."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jtok_jax.mesh import TOKENS
from jtok_jax.model.grouped_matmul import grouped_matmul
from jtok_jax.model.layers import block_norm, residual_std, swiglu
from jtok_jax.model.variables import normal
from jtok_jax.model_config import ModelConfig


class ExpertRoute(NamedTuple):
    """Which experts a token uses, with which weights."""

    choice_Rk: jax.Array  # int32
    weights_Rk: jax.Array  # float32
    probabilities_RE: jax.Array  # float32, sum 1


def route(x_RD: jax.Array, router_DE: jax.Array, *, top_k: int, renormalize: bool) -> ExpertRoute:
    """Return the top k of a softmax over all experts, in float32."""
    logits_RE = jnp.dot(x_RD.astype(jnp.float32), router_DE, precision=jax.lax.Precision.HIGHEST)
    probabilities_RE = jax.nn.softmax(logits_RE, axis=-1)
    weights_Rk, choice_Rk = jax.lax.top_k(probabilities_RE, top_k)
    if renormalize:
        weights_Rk = weights_Rk / weights_Rk.sum(axis=-1, keepdims=True)
    return ExpertRoute(choice_Rk, weights_Rk, probabilities_RE)


def balance_loss(route: ExpertRoute) -> jax.Array:
    """Return E * sum_e f_e P_e, share of choices times mean probability (arXiv 2101.03961)."""
    num_experts = route.probabilities_RE.shape[-1]
    counts_E = jnp.bincount(route.choice_Rk.reshape(-1), length=num_experts)
    share_E = counts_E.astype(jnp.float32) / route.choice_Rk.size
    return num_experts * jnp.sum(share_E * route.probabilities_RE.mean(axis=0))


def experts(
    x_RD: jax.Array,
    choice_Rk: jax.Array,
    weights_Rk: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    *,
    some_elsewhere: bool = False,
) -> jax.Array:
    """Return the weighted sum of the chosen experts' SwiGLU of every token, [R, D].

    1. sort the (token, choice) pairs by expert  2. three grouped matmuls over the sorted rows
    3. put the rows back in order                4. weigh and add the k rows of a token.

    Args:
        choice_Rk: int32 in [0, E); E for one that counts nothing, where there may be such.
        some_elsewhere: there may be.
    """
    dtype, (num_rows, top_k) = x_RD.dtype, choice_Rk.shape
    flat = choice_Rk.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes_E = jnp.bincount(flat, length=gate_EDF.shape[0]).astype(jnp.int32)
    sorted_x = x_RD[order // top_k]
    hidden = jax.nn.silu(grouped_matmul(sorted_x, gate_EDF.astype(dtype), sizes_E))
    hidden = hidden * grouped_matmul(sorted_x, up_EDF.astype(dtype), sizes_E)
    sorted_out = grouped_matmul(hidden, down_EFD.astype(dtype), sizes_E)
    place = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True)
    out_RkD = sorted_out[place].reshape(num_rows, top_k, -1)
    if some_elsewhere:  # whatever the place of one that counts nothing
        out_RkD = jnp.where((choice_Rk < gate_EDF.shape[0])[..., None], out_RkD, 0)
    mixed = jnp.einsum("RkD,Rk->RD", out_RkD, weights_Rk, preferred_element_type=jnp.float32)
    return mixed.astype(dtype)


def sharded_experts(mesh: Mesh, x_BTD, choice_BTk, weights_BTk, *matrices: jax.Array) -> jax.Array:
    """Return `experts` of tokens on several devices, [B, T, D]; no token is dropped.

    Along the mesh axis "expert" every device holds some experts. It gathers the tokens of its
    group and computes what they chose of its own. The parts of a token's sum are added where the
    token is: 2 D entries a token there and back for every further device of a group.
    """

    def local(x, choice, weights, *matrices):
        flat = lambda value: value.reshape(-1, value.shape[-1])
        everyone = lambda value: jax.lax.all_gather(flat(value), "expert", tiled=True)
        count = matrices[0].shape[0]
        choice = everyone(choice) - jax.lax.axis_index("expert") * count
        own = (choice >= 0) & (choice < count)
        choice, weights = jnp.where(own, choice, count), jnp.where(own, everyone(weights), 0.0)
        several = {"some_elsewhere": mesh.shape["expert"] > 1}
        out = experts(everyone(x), choice, weights, *matrices, **several)
        return jax.lax.psum_scatter(out, "expert", tiled=True).reshape(x.shape)

    specs = (TOKENS,) * 3 + (PartitionSpec("expert"),) * 3
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=TOKENS, check_vma=False)
    return run(x_BTD, choice_BTk, weights_BTk, *[w.astype(x_BTD.dtype) for w in matrices])


class MoeResult(NamedTuple):
    """Output of the experts and the balance loss of their router."""

    out_BTD: jax.Array
    balance: jax.Array


class Moe(nnx.Module):
    """Parameters of the pre-norm mixture of experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        moe, dim, dtype = config.moe, config.model_dim, config.param_dtype
        count, width, shared = moe.num_experts, moe.expert_dim, moe.shared_dim
        into = {"std": config.init_std, "dtype": dtype}
        back = {"std": residual_std(config), "dtype": dtype}
        used = {"share": (moe.top_k, count)}
        self.norm = block_norm(config)
        std = moe.router_init_std
        self.router = normal(rngs, dim, count, axes="DE", std=std, full_precision=True)
        self.gate = normal(rngs, count, dim, width, axes="EDF", **into, **used)
        self.up = normal(rngs, count, dim, width, axes="EDF", **into, **used)
        self.down = normal(rngs, count, width, dim, axes="EFD", **back, **used)
        if shared:
            self.shared_gate = normal(rngs, dim, shared, axes="DS", **into)
            self.shared_up = normal(rngs, dim, shared, axes="DS", **into)
            self.shared_down = normal(rngs, shared, dim, axes="SD", **back)
        self.config = moe

    def __call__(self, x_BTD: jax.Array, mesh: Mesh | None = None) -> MoeResult:
        """Return the increment and the balance loss; `mesh` is of several devices, None on one."""
        config, matrices = self.config, (self.gate[...], self.up[...], self.down[...])
        x_RD = x_BTD.reshape(-1, x_BTD.shape[-1])
        chosen = route(x_RD, self.router[...], top_k=config.top_k, renormalize=config.renormalize)
        if mesh is None:
            out_RD = experts(x_RD, chosen.choice_Rk, chosen.weights_Rk, *matrices)
            out_BTD = out_RD.reshape(x_BTD.shape)
        else:
            by_token = [x.reshape(*x_BTD.shape[:2], -1) for x in chosen[:2]]
            out_BTD = sharded_experts(mesh, x_BTD, *by_token, *matrices)
        if config.shared_dim:
            out_BTD = out_BTD + swiglu(
                x_BTD, self.shared_gate[...], self.shared_up[...], self.shared_down[...]
            )
        return MoeResult(out_BTD, balance_loss(chosen))
