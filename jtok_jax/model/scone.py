# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""SCONE (arXiv 2502.01637): a Transformer A_f that makes input embeddings of frequent n-grams.

    ids --NgramIndex--> n-grams --plan_nodes--> nodes --embedding, A_f--> e [U, D]
    a token where a frequent n-gram ends has the e of the longest, every other its own embedding

A_f is causal and counts positions from an n-gram's first token. So what it makes of a prefix is the
same in all n-grams that begin with it, and every prefix of a frequent n-gram is one, or a token.
All prefixes of the n-grams of a batch, each once, are its nodes. A node attends to its ancestors.
The output is that of running A_f on every n-gram alone, for a part of the work.

Axes: G groups of sequences, one for each device that has its own; U nodes; n lengths, from 1.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jtok_jax.mesh import BATCH, num_shards, split_batch, split_columns
from jtok_jax.model.attention import AttentionResult
from jtok_jax.model.block import over_layers, remat, stacked_blocks
from jtok_jax.model.layers import rms_norm, rotation
from jtok_jax.model.ngram_index import (
    NONE,
    NgramIndex,
    longest,
    numbers_by_length,
    with_before,
)
from jtok_jax.model.variables import Embedding, Vector, normal
from jtok_jax.model_config import ModelConfig
from jtok_jax.streams import IdStream

ALWAYS = 1024  # room for all of so few nodes is no matter
NO_NODE = jnp.iinfo(jnp.int32).max  # sorts after every number


class Nodes(NamedTuple):
    """The nodes of a group of sequences, those of short n-grams first."""

    tokens_U: jax.Array  # int32, the last token of each
    depth_U: jax.Array  # int32, its position in an n-gram, from 0
    ancestors_Un: jax.Array  # int32, the place of its prefix of each length; its own place follows
    place_BT: jax.Array  # int32, the node whose output a token has; NONE: its own embedding
    total: jax.Array  # int32, how many there are, or would be had they room
    matched: jax.Array  # int32, tokens where a frequent n-gram ends
    shortened: jax.Array  # int32, those that have a shorter one or none, as room was lacking


def plan_nodes(numbers: list[jax.Array], ids_BX: jax.Array, *, length: int, room: int) -> Nodes:
    """Return the nodes of all n-grams that the last `length` tokens of sequences have.

    Of more nodes than `room` the longest are left out. Then a token has its longest n-gram that is
    there as another's prefix, or its own embedding.

    Args:
        numbers: int32 [B, X] by length, see `numbers_by_length`.
    """
    size, orders = ids_BX.size, len(numbers)
    _, length_BX = longest(numbers)
    length_BX = jnp.where(jnp.arange(ids_BX.shape[1]) < ids_BX.shape[1] - length, 1, length_BX)
    needed_nBX = jnp.stack([_is_needed(length_BX, order, orders) for order in range(1, orders + 1)])
    keys = jnp.where(needed_nBX, jnp.stack(numbers), NO_NODE).reshape(-1)
    by_number = jnp.argsort(keys)
    ordered = keys[by_number]
    is_first = jnp.append(True, ordered[1:] != ordered[:-1]) & (ordered != NO_NODE)
    rank = jnp.cumsum(is_first) - 1
    place = jnp.zeros(keys.size, jnp.int32).at[by_number].set(rank, unique_indices=True)
    first = jnp.where(is_first & (rank < room), rank, room)
    found_U = jnp.zeros(room, jnp.int32).at[first].set(by_number, mode="drop")
    total = is_first.sum(dtype=jnp.int32)

    own_U = jnp.arange(room)
    is_there = own_U < total
    depth_U, at_U = jnp.where(is_there, found_U // size, 0), found_U % size

    def ancestor(order: int) -> jax.Array:
        """Return the place of each node's prefix of order + 1 tokens, or its own."""
        place_U = place[order * size + at_U - depth_U + order]
        return jnp.where(is_there & (order <= depth_U), place_U, own_U)

    has_room_nBX = needed_nBX & (place.reshape(needed_nBX.shape) < room)
    place_BX, has_BX = jnp.full(ids_BX.shape, NONE, jnp.int32), jnp.ones_like(ids_BX)
    for order in range(2, orders + 1):
        here = has_room_nBX[order - 1]
        place_BX = jnp.where(here, place.reshape(needed_nBX.shape)[order - 1], place_BX)
        has_BX = jnp.where(here, order, has_BX)
    count = lambda mask_BX: mask_BX[:, -length:].sum(dtype=jnp.int32)
    return Nodes(
        tokens_U=ids_BX.reshape(-1)[at_U],
        depth_U=depth_U,
        ancestors_Un=jnp.stack([ancestor(order) for order in range(orders)], axis=-1),
        place_BT=place_BX[:, -length:],
        total=total,
        matched=count(length_BX > 1),
        shortened=count(has_BX < length_BX),
    )


def _is_needed(length_BX: jax.Array, order: int, longest_order: int) -> jax.Array:
    """Return where a prefix of `order` tokens ends of the n-gram that another token has."""
    width, found_BX = length_BX.shape[1], jnp.zeros(length_BX.shape, bool)
    for whole in range(max(order, 2), longest_order + 1):
        later = jnp.pad(length_BX == whole, ((0, 0), (0, whole - order)))
        found_BX = found_BX | later[:, whole - order :][:, :width]
    return found_BX


def embed_ngrams(
    model: "NgramModel",
    ids_BT: jax.Array,
    before_BC: jax.Array | None,
    index: NgramIndex,
    stream: IdStream,
    embed: Callable[[jax.Array], jax.Array],
    h_BTD: jax.Array,
    *,
    room: float,
    training: bool,
    mesh: Mesh | None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the embedding of every token, that of its longest frequent n-gram if it has one.

    Args:
        before_BC: of `tables.stream_ids`.
        embed: int32 ids to their embeddings, one axis more.
        h_BTD: that of `ids`.
        room: nodes a token. Outside of training there is always room for all.

    Returns:
        [B, T, D], and float32 scalars: "ngram_nodes" a token, and the shares of tokens that have an
        n-gram, "ngram_matched", or a shorter one than they would for lack of room,
        "ngram_shortened".
    """
    groups = num_shards(mesh, BATCH) if mesh else 1
    ids_BX = with_before(ids_BT, before_BC, stream.order)
    numbers = numbers_by_length(index, ids_BX, stream)
    grouped = lambda x: x.reshape(groups, -1, *x.shape[1:])
    constrained = jax.lax.with_sharding_constraint
    split = lambda x, how: x if mesh is None else constrained(x, how(mesh))
    of_batch = lambda x: split(grouped(x), split_batch)
    of_group = [of_batch(one) for one in numbers], of_batch(ids_BX)
    length, tokens = ids_BT.shape[1], ids_BT.size // groups
    size = ids_BX.size // groups
    most = min(stream.vocab_rows, size) + (stream.order - 1) * size
    some = min(math.ceil(room * tokens), most)

    def planned(room: int) -> Nodes:
        return jax.vmap(functools.partial(plan_nodes, length=length, room=room))(*of_group)

    def run(nodes: Nodes):
        out_GUD = model(embed(nodes.tokens_U), nodes, split)
        place_GR = nodes.place_BT.reshape(groups, -1)
        found = jnp.take_along_axis(out_GUD, jnp.maximum(place_GR, 0)[..., None], axis=1)
        has_one = (nodes.place_BT >= 0).reshape(ids_BT.shape)
        counts = nodes.total, nodes.matched, nodes.shortened
        shares = [one.sum().astype(jnp.float32) / ids_BT.size for one in counts]
        return jnp.where(has_one[..., None], found.reshape(h_BTD.shape), h_BTD), shares

    if training or most <= ALWAYS:
        h_BTD, shares = run(planned(some if training else most))
    else:  # seldom more than some: so all are computed only where there are so many
        nodes = planned(some)
        fits = nodes.total.max() <= some
        h_BTD, shares = jax.lax.cond(fits, lambda: run(nodes), lambda: run(planned(most)))
    names = "ngram_nodes", "ngram_matched", "ngram_shortened"
    return h_BTD, dict(zip(names, shares, strict=True))


def attend_to_ancestors(query_GUNH, key_GUKH, value_GUKH, ancestors_GUn, depth_GU) -> jax.Array:
    """Return mixed values [G, U, N, H] of every node attending to its prefixes and itself."""
    groups, nodes, heads, size = key_GUKH.shape
    query = query_GUNH.reshape(groups, nodes, heads, -1, size)
    orders = range(ancestors_GUn.shape[-1])
    # One length after the other: a copy of the keys at a time rather than one for every length.
    of_length = lambda x_GUKH, order: jnp.take_along_axis(
        x_GUKH, ancestors_GUn[..., order, None, None], axis=1
    )
    score = functools.partial(jnp.einsum, "GUKqH,GUKH->GUKq", preferred_element_type=jnp.float32)
    scores = jnp.stack([score(query, of_length(key_GUKH, order)) for order in orders], axis=-1)
    is_prefix = jnp.arange(len(orders)) <= depth_GU[..., None]
    scores = jnp.where(is_prefix[:, :, None, None], scores / size**0.5, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value_GUKH.dtype)
    mixed = sum(
        weights[..., order, None] * of_length(value_GUKH, order)[:, :, :, None] for order in orders
    )
    return mixed.reshape(query_GUNH.shape)


class NgramModel(nnx.Module):
    """A_f: blocks as the model's, positions from an n-gram's first token, a norm of its output."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        own, dim, dtype = config.ngram_model, config.model_dim, config.param_dtype
        order = config.id_streams[config.arms.scone.stream].order
        # Absolute positions; small, as what they are added to may be.
        self.position = normal(
            rngs, order, own.model_dim, axes="nD", std=config.embed_std, dtype=dtype,
            kind=Embedding, share=(0, 1),
        )  # fmt: skip
        self.blocks = stacked_blocks(own, rngs)
        if config.arms.scone.zero_init:
            for weight in (self.blocks.attention.out, self.blocks.ffn.down):
                weight[...] = jnp.zeros_like(weight[...])
        if own.model_dim != dim:
            std = config.init_std
            self.enter = normal(rngs, dim, own.model_dim, axes="Dn", std=std, dtype=dtype)
            self.leave = normal(rngs, own.model_dim, dim, axes="nD", std=std, dtype=dtype)
        scale = config.arms.scone.output_init or config.embed_std
        self.norm = Vector(jnp.full(dim, scale, jnp.float32), "D")
        self.own, self.eps = own, config.norm_eps

    def __call__(self, x_GUD: jax.Array, nodes: Nodes, split: Callable) -> jax.Array:
        """Return the outputs [G, U, D] of nodes whose last tokens have the embeddings `x`.

        Args:
            nodes: of all groups, each array [G, ...].
            split: (array [G, U, ...], function of a mesh) -> the array laid out so.
        """
        dtype, is_as_wide = x_GUD.dtype, self.own.model_dim == x_GUD.shape[-1]
        if not is_as_wide:
            x_GUD = x_GUD @ self.enter[...].astype(dtype)
        # As columns, like the embeddings: else XLA would gather the gradients of all devices.
        h_GUd = x_GUD + split(self.position[nodes.depth_U].astype(dtype), split_columns)
        # Positions are those added: no head is rotated.
        rope = rotation(jnp.zeros((1, h_GUd.shape[1]), jnp.int32), self.own)
        attend = jax.checkpoint(attend_to_ancestors, prevent_cse=False)

        def attend_here(query, key, value):
            return AttentionResult(
                attend(query, key, value, nodes.ancestors_Un, nodes.depth_U), None
            )

        graph, params = nnx.split(self.blocks)

        def body(h_GUd, layer):
            block = nnx.merge(graph, layer[0])
            out, _, _ = block(h_GUd, rope=rope, attend=attend_here, lookups={}, mesh=None)
            return split(out, split_batch), None

        h_GUd = split(h_GUd, split_batch)
        h_GUd, _ = over_layers(remat(body, self.own.remat), h_GUd, (params, None))
        if not is_as_wide:
            h_GUd = h_GUd @ self.leave[...].astype(dtype)
        return rms_norm(h_GUd, self.norm[...], eps=self.eps)
