# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A block, and a stack of them; where the token tables enter one.

h ------------+--> norm -> attention --+--> h~ --+--> norm -> feed-forward -> dm --+
              |                        |         |                                 |
              +------------------------+         |        JTok: dm * gate(row)  <--+
                                                 |        JTok-M: dm + dr(rows)    |
                                                 +---------------------------------+--> h'
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jtok_jax.model.arms import arms_of_layer, table_name
from jtok_jax.model.attention import ROTATED, Attend, Attention
from jtok_jax.model.exchange import FETCHED
from jtok_jax.model.jtok import jtok_layer
from jtok_jax.model.layers import FeedForward, Rotation, normed
from jtok_jax.model.moe import Moe
from jtok_jax.model.pattention import PattentionFeedForward
from jtok_jax.model.splash import SAVED
from jtok_jax.model.tables import Lookup
from jtok_jax.model.variables import owned
from jtok_jax.model_config import ModelConfig

TABLES = "tables"  # where a model holds JTok's, which every other table has its path for


class BlockAux(NamedTuple):
    """Holds what a block reports beside its output; stacked to [L, ...] by the scan."""

    moe_balance: jax.Array
    jtok_balance: jax.Array
    health: dict[str, jax.Array]


class Block(nnx.Module):
    """Attention, feed-forward (dense or experts) and, where configured, the token tables."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention = Attention(config, rngs=rngs)
        if config.moe.num_experts:
            self.moe = Moe(config, rngs=rngs)
        else:
            pattention = config.pattention.kind != "none"
            self.ffn = (PattentionFeedForward if pattention else FeedForward)(config, rngs=rngs)
        if config.jtok.kind != "none":
            self.jtok = owned(jtok_layer(config, rngs=rngs), "jtok")
        if config.arms.names:
            self.arms = arms_of_layer(config, rngs=rngs)
        self.config = config

    def __call__(
        self,
        h_BTD: jax.Array,
        *,
        rope: Rotation,
        attend: Attend,
        lookups: Mapping[str, Lookup],
        mesh: Mesh | None,
        with_health: bool = False,
    ) -> tuple[jax.Array, object, BlockAux]:
        """Return (h', what `attend` caches, aux); `lookups` has the tables of this layer."""
        lookup = lookups.get(TABLES)
        arms = [
            (getattr(self.arms, name), lookups[table].rows() if table in lookups else None)
            for name in self.config.arms.chosen()
            for table in [table_name(name)]
        ]
        pre_BTD = normed(h_BTD, self.attention.norm, self.config)
        options = self.config.jtok
        gated, shared = options.kind == "jtok", options.router_norm == "shared"
        prefetched = None
        if lookup and (gated or options.router_input == "pre_attention"):
            prefetched = self.jtok.prefetch(pre_BTD if shared else h_BTD, lookup)

        def change_values(value_BTKH):
            for arm, rows in arms:
                value_BTKH = arm.values(value_BTKH, rows)
            return value_BTKH

        out_BTD, cached = self.attention(
            pre_BTD, rope=rope, attend=attend, change_values=change_values
        )
        tilde_BTD = h_BTD + out_BTD
        feed = self.moe if self.config.moe.num_experts else self.ffn
        post_BTD = normed(tilde_BTD, feed.norm, self.config)
        if lookup and not prefetched:
            prefetched = self.jtok.prefetch(post_BTD if shared else tilde_BTD, lookup)
        moe_balance = jnp.float32(0)
        if self.config.moe.num_experts:
            dm_BTD, moe_balance = self.moe(post_BTD, mesh)
        else:
            dm_BTD = self.ffn(post_BTD)
        for arm, rows in arms:
            dm_BTD = arm.increment(dm_BTD, post_BTD, rows)
        health = {"hidden_std": moments(h_BTD)} if with_health else {}
        if lookup is None:
            return tilde_BTD + dm_BTD, cached, BlockAux(moe_balance, jnp.float32(0), health)
        known = {"lookup": lookup, "prefetched": prefetched}
        if gated:
            h_BTD, balance = self.jtok(tilde_BTD, dm_BTD, **known), jnp.float32(0)
        else:
            h_BTD, balance = self.jtok(tilde_BTD, None, dm_BTD, **known)
        if with_health:
            health |= self.jtok.health(dm_BTD, prefetched, lookup)
        return h_BTD, cached, BlockAux(moe_balance, balance, health)


def stacked_blocks(config: ModelConfig, rngs: nnx.Rngs) -> Block:
    @nnx.split_rngs(splits=config.num_layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs: nnx.Rngs) -> Block:
        return Block(config, rngs=rngs)

    return build(rngs)


def over_layers(body: Callable, h_BTD: jax.Array, layers: tuple):
    """Return a scan over `layers`, or, where the last of them is a cache, the same one by one.

    Caches of layers are arrays apart, so that each is read and written where it lies.
    """
    (*stacks, cache), cached, auxs = layers, [], []
    if cache is None:
        return jax.lax.scan(body, h_BTD, layers)
    for index, of_layer in enumerate(cache):
        mine = jax.tree.map(lambda stack, index=index: stack[index], stacks)
        h_BTD, (new, aux) = body(h_BTD, (*mine, of_layer))
        cached.append(new)
        auxs.append(aux)
    return h_BTD, (cached, jax.tree.map(lambda *of_layers: jnp.stack(of_layers), *auxs))


def moments(x_BTD: jax.Array) -> jax.Array:
    """Return float32 [B, 2], means of x and x^2 by sequence: no layer waits for other devices."""
    x_BTD = jax.lax.stop_gradient(x_BTD).astype(jnp.float32)
    return jnp.stack([x_BTD.mean(axis=(1, 2)), jnp.square(x_BTD).mean(axis=(1, 2))], axis=-1)


def remat(body: Callable, kind: str) -> Callable:
    if kind == "none":
        return body
    known = jax.checkpoint_policies
    policies = {
        "dots": known.save_from_both_policies(
            known.dots_with_no_batch_dims_saveable,
            known.save_only_these_names(FETCHED, ROTATED, SAVED),
        ),
        "full": known.nothing_saveable,
    }
    return jax.checkpoint(body, policy=policies[kind], prevent_cse=False)
