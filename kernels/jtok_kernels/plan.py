# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The row plan of a step: which rows it uses, and which tokens use each.

Axes: N microbatches, T tokens of one, U unique ids of all, S pieces, V rows of a table.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

PIECE = 32  # most tokens in one piece of a run of equal ids


class Order(NamedTuple):
    """Tokens of one microbatch sorted by id; all int32, with a leading [N] for several.

    Tokens of one unique id are a run; a run is cut into pieces of at most `PIECE` tokens, so that
    one frequent id does not become one long sum. Within a run tokens keep their order: a sum over
    pieces in turn depends on the tokens of its id alone, not on where they stand in the batch.
    """

    place: jax.Array  # [T], index of each token's id in `unique_U`
    token: jax.Array  # [T], tokens in sorted order
    run_piece: jax.Array  # [U + 1], first piece of every run; the last entry counts the pieces
    piece_run: jax.Array  # [S], index in `unique_U`; U for pieces that hold nothing
    piece_start: jax.Array  # [S], first token of the piece in sorted order
    piece_size: jax.Array  # [S], tokens of the piece, 0 to PIECE


class RowPlan(NamedTuple):
    """One plan a step, shared by all layers, the forward and the backward pass."""

    unique_U: jax.Array  # int32, ascending; V fills what is left
    order: Order


def num_unique(num_ids: int, num_rows: int) -> int:
    """U: the static bound on the unique ids among `num_ids` ids of a table of `num_rows` rows."""
    return min(num_ids, num_rows)


def num_pieces(num_tokens: int, num_unique: int) -> int:
    """S: the static bound on the pieces of a microbatch; none is ever dropped."""
    return min(num_tokens, num_unique + num_tokens // PIECE)


def row_plan(ids: jax.Array, *, num_rows: int) -> RowPlan:
    """The plan of `ids`, int32 [T], or [N, T] for N microbatches with one set of unique ids.

    Every id must be in [0, num_rows); ids are checked on the host, not here.

    Raises:
        ValueError: `ids` has another shape or dtype, or there are none.
    """
    if ids.ndim not in (1, 2) or ids.dtype != jnp.int32 or not ids.size:
        raise ValueError(f"ids are {ids.dtype} {ids.shape}; expected int32 [T] or [N, T], T >= 1.")
    bound = num_unique(ids.size, num_rows)
    flat = ids.reshape(-1)
    by_id = jnp.argsort(flat, stable=True)
    sorted_ids = flat[by_id]
    starts = jnp.concatenate([jnp.ones(1, bool), sorted_ids[1:] != sorted_ids[:-1]])
    run = jnp.cumsum(starts, dtype=jnp.int32) - 1
    unique_U = jnp.full(bound, num_rows, jnp.int32).at[run].set(sorted_ids)
    place = jnp.zeros_like(flat).at[by_id].set(run).reshape(ids.shape)
    order = lambda place_T: _order(place_T, bound)
    return RowPlan(unique_U, order(place) if ids.ndim == 1 else jax.vmap(order)(place))


def _order(place_T: jax.Array, bound: int) -> Order:
    token = jnp.argsort(place_T, stable=True).astype(jnp.int32)
    run_start = jnp.searchsorted(place_T[token], jnp.arange(bound + 1, dtype=jnp.int32))
    run_start = run_start.astype(jnp.int32)
    pieces_U = -(-jnp.diff(run_start) // PIECE)
    run_piece = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(pieces_U, dtype=jnp.int32)])
    piece = jnp.arange(num_pieces(place_T.size, bound), dtype=jnp.int32)
    piece_run = jnp.searchsorted(run_piece[1:], piece, side="right").astype(jnp.int32)
    run = jnp.minimum(piece_run, bound - 1)
    start = run_start[run] + PIECE * (piece - run_piece[run])
    size = jnp.clip(run_start[run + 1] - start, 0, PIECE)
    holds = piece_run < bound
    return Order(
        place_T, token, run_piece, piece_run, jnp.where(holds, start, 0), jnp.where(holds, size, 0)
    )
