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
    its pieces in turn depends on the tokens of its id alone, not on where they stand in the batch.

    Every run has a piece, if only an empty one. Runs of several pieces are split: each piece of
    theirs has a slot for its partial sum. Large pieces come first, so that blocks which take them
    in turn end together; those that are none come last.
    """

    place: jax.Array  # [T], index of each token's id in `unique_U`
    token: jax.Array  # [T], tokens in sorted order
    piece_run: jax.Array  # [S], index in `unique_U`; U for pieces that are none
    piece_start: jax.Array  # [S], first token of the piece in sorted order
    piece_size: jax.Array  # [S], tokens of the piece, 0 to PIECE
    piece_slot: jax.Array  # [S], slot of a piece of a split run, else -1
    piece_count: jax.Array  # scalar, how many of the S are pieces
    split_run: jax.Array  # [R], index in `unique_U` of every split run; U fills what is left
    split_slot: jax.Array  # [R + 1], first slot of every split run, and the end


class RowPlan(NamedTuple):
    """One plan a step, shared by all layers, the forward and the backward pass."""

    unique_U: jax.Array  # int32, ascending; V fills what is left
    order: Order
    overflow: jax.Array | None  # bool: more unique ids than U; None: there cannot be
    found: jax.Array  # int32, different ids, those included that U has no room for


def num_pieces(num_tokens: int, num_unique: int) -> int:
    """Return S: the static bound on the pieces of a microbatch; none is ever dropped."""
    return num_unique + num_tokens // PIECE


def num_split(num_tokens: int) -> tuple[int, int]:
    """Return (R, slots): static bounds on the split runs of a microbatch and their pieces."""
    return max(1, num_tokens // (PIECE + 1)), max(1, 2 * num_tokens // PIECE)


def row_plan(
    ids: jax.Array, *, num_rows: int, max_unique: int | None = None, also: jax.Array | None = None
) -> RowPlan:
    """Return the plan of `ids`, int32 [T], or [N, T] for N microbatches with one set of unique ids.

    Every id must be in [0, num_rows); ids are checked on the host, not here. One outside counts as
    the nearest inside.

    Args:
        max_unique: at most so many different ids are expected; row gradients, their memory and
            their update shrink with it. A program cannot raise: compare `found` on the host. Where
            there are more, every gradient that needs the plan holds a NaN: nothing is dropped in
            silence.
            None: as many as there are ids or rows, which is always enough.
        also: int32 of any shape: ids of other devices, which share the unique ids with `ids`.

    Raises:
        ValueError: `ids` has another shape or dtype or is empty, or `max_unique` is below 1.
    """
    if ids.ndim not in (1, 2) or ids.dtype != jnp.int32 or not ids.size:
        raise ValueError(f"ids are {ids.dtype} {ids.shape}; expected int32 [T] or [N, T], T >= 1.")
    if max_unique is not None and max_unique < 1:
        raise ValueError(f"max_unique is {max_unique}; expected at least 1.")
    flat = ids.reshape(-1) if also is None else jnp.concatenate([ids.reshape(-1), also.reshape(-1)])
    enough = min(flat.size, num_rows)
    bound = min(enough, max_unique or enough)
    flat = jnp.clip(flat, 0, num_rows - 1)
    by_id = _sorted_tokens(flat)
    sorted_ids = flat[by_id]
    starts = jnp.concatenate([jnp.ones(1, bool), sorted_ids[1:] != sorted_ids[:-1]])
    run = jnp.cumsum(starts, dtype=jnp.int32) - 1
    unique_U = jnp.full(bound, num_rows, jnp.int32).at[run].set(sorted_ids, mode="drop")
    found = run[-1] + 1
    overflow = None if bound == enough else found > bound
    run = jnp.minimum(run, bound - 1)
    place = jnp.zeros_like(flat).at[by_id].set(run)[: ids.size].reshape(ids.shape)
    if ids.ndim == 1:
        token = by_id if also is None else _sorted_tokens(place)
        return RowPlan(unique_U, _order(place, token, bound), overflow, found)
    # The order of the whole says nothing of the order within one of several microbatches.
    whole = ids.shape[0] == 1 and also is None
    token = by_id[None] if whole else jax.vmap(_sorted_tokens)(place)
    order = jax.vmap(lambda *args: _order(*args, bound))(place, token)
    return RowPlan(unique_U, order, overflow, found)


def _sorted_tokens(keys_T: jax.Array) -> jax.Array:
    """Return the tokens by key, then as they stand; int32."""
    return jnp.argsort(keys_T, stable=True).astype(jnp.int32)


def _order(place_T: jax.Array, token: jax.Array, bound: int) -> Order:
    # Counts and sums where a search would do: a search is a loop of log2(T) turns on a GPU.
    size_U = jnp.zeros(bound, jnp.int32).at[place_T].add(1)
    run_start = _starts(size_U)
    pieces_U = jnp.maximum(1, -(-size_U // PIECE))
    run_piece = _starts(pieces_U)
    piece = jnp.arange(num_pieces(place_T.size, bound), dtype=jnp.int32)
    ends = jnp.zeros_like(piece).at[run_piece[1:]].set(1, mode="drop", unique_indices=True)
    piece_run = jnp.cumsum(ends, dtype=jnp.int32)
    run = jnp.minimum(piece_run, bound - 1)
    nth = piece - run_piece[run]
    start = run_start[run] + PIECE * nth
    holds = piece_run < bound
    size = jnp.where(holds, jnp.clip(run_start[run + 1] - start, 0, PIECE), 0)
    split_U = pieces_U > 1
    run_slot = _starts(jnp.where(split_U, pieces_U, 0))
    slot = jnp.where(holds & split_U[run], run_slot[run] + nth, -1)
    num_runs, _ = num_split(place_T.size)
    target = jnp.where(split_U, jnp.cumsum(split_U) - 1, num_runs)  # outside: dropped
    split_run = (
        jnp.full(num_runs, bound, jnp.int32)
        .at[target]
        .set(jnp.arange(bound, dtype=jnp.int32), mode="drop")
    )
    split_slot = run_slot[jnp.concatenate([split_run, jnp.full(1, bound, jnp.int32)])]
    start = jnp.where(holds, start, 0)
    largest_first = jnp.argsort(jnp.where(holds, -size, 1), stable=True)
    pieces = (x[largest_first] for x in (piece_run, start, size, slot))
    return Order(place_T, token, *pieces, run_piece[bound], split_run, split_slot)


def _starts(counts: jax.Array) -> jax.Array:
    """Return [0, c0, c0 + c1, ...], int32."""
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
