# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Refuses shapes, dtypes and options that the public operations cannot take: ValueError."""

import jax
import jax.numpy as jnp

from jtok_kernels.packing import width
from jtok_kernels.plan import RowPlan
from jtok_kernels.reference import NORMS


def check_stack(name: str, table, axes: str, layer) -> None:
    """Raise ValueError unless a table has `axes`, or a stack of them where there is a layer."""
    ndim = len(axes.split(", ")) + (layer is not None)
    require(table.ndim == ndim, name, table, f"[{axes}], or [L, {axes}] with layer")
    if isinstance(layer, int) and not 0 <= layer < table.shape[0]:
        raise ValueError(f"layer is {layer}; expected one of the {table.shape[0]} of {name}.")


def check_stream(h, delta, scale) -> None:
    """Raise ValueError unless h and delta are [T, D] and the scale is [D]."""
    fits = h.ndim == 2 and h.dtype in (jnp.bfloat16, jnp.float32)
    require(fits, "h", h, "[T, D], bfloat16 or float32")
    fits = delta.shape == h.shape and delta.dtype == h.dtype
    require(fits, "delta", delta, f"{h.dtype} {h.shape}")
    fits = scale.shape == h.shape[1:] and scale.dtype == jnp.float32
    require(fits, "scale", scale, f"float32 {h.shape[1:]}")


def check_norm(norm: str) -> None:
    """Raise ValueError unless the norm is one of those there are."""
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; expected one of {', '.join(NORMS)}.")


def check_rows(table, ids, row_grads, plan: RowPlan | None, *, several: bool) -> None:
    """Raise ValueError unless ids, plan and row gradients belong together and to the table."""
    kinds = jnp.bfloat16, jnp.float32, jnp.uint32
    require(table.dtype in kinds, "table", table, "bfloat16, float32 or packed")
    require(ids.ndim == 1 and ids.dtype == jnp.int32, "ids", ids, "int32 [T]")
    if plan is not None:
        expected = f"a plan of {ids.shape} ids; of one of [N, T] ids take microbatch i of `order`"
        place = plan.order.place
        require(place.shape == ids.shape, "plan.order", place, expected)
    if row_grads is None:
        return
    if plan is None:
        raise ValueError("row_grads needs the plan whose unique ids its rows stand for.")
    shape = (*table.shape[-3:-2] * several, plan.unique_U.size, width(table))
    fits = row_grads.shape == shape and row_grads.dtype == jnp.float32
    expected = f"float32 {shape}: every unique id needs a row, none is dropped"
    require(fits, "row_grads", row_grads, expected)


def check_choice(choice, weights, ids, num_tables: int) -> None:
    """Raise ValueError unless each token chooses 1 to `num_tables` tables, with as many weights."""
    fits = choice.ndim == 2 and choice.dtype == jnp.int32 and choice.shape[:1] == ids.shape
    require(fits and 1 <= choice.shape[1] <= num_tables, "choice", choice,
             f"int32 [{ids.size}, K], K from 1 to the {num_tables} tables")  # fmt: skip
    require(weights.shape == choice.shape and weights.dtype == jnp.float32, "weights", weights,
             f"float32 {choice.shape}")  # fmt: skip


def require(holds: bool, name: str, found: jax.Array, expected: str) -> None:
    """Raise ValueError with what was found and expected unless it holds."""
    if not holds:
        raise ValueError(f"{name} is {found.dtype} {found.shape}; expected {expected}.")
