# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The public operations on token tables, with their derivatives.

Axes: T tokens, D width, V rows of a table, E tables of a layer, K tables a token reads, L stacked
layers, U unique ids of a step (`RowPlan.unique_U`).

Derivatives reach h, delta, the weights, the scale, and the rows in one of two ways:
  `row_grads` given   its cotangent is the gradient per unique row; the table itself gets none
  `row_grads` None    the table gets a dense gradient of its whole shape (none if packed)
The first is for training: a dense gradient of a stacked table is as large as the stack.
There is no forward-mode derivative.
"""

import functools
import numbers
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jtok_kernels import reference
from jtok_kernels.checks import (
    check_choice,
    check_norm,
    check_rows,
    check_stack,
    check_stream,
    require,
)
from jtok_kernels.choose import backend, choose
from jtok_kernels.form import Form
from jtok_kernels.packing import width
from jtok_kernels.plan import RowPlan, row_plan


class _Static(NamedTuple):
    form: Form
    backend: str
    dense: bool  # the table gets a dense gradient


def jtok(
    h: jax.Array,
    delta: jax.Array,
    table: jax.Array,
    ids: jax.Array,
    scale: jax.Array,
    *,
    eps: float,
    norm: str = "l2",
    layer: jax.Array | int | None = None,
    plan: RowPlan | None = None,
    row_grads: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Return h + delta * (1 + scale * Norm_eps(table[ids])), arXiv 2602.00800 Eq. 7 to 9, [T, D].

    Args:
        h: stream after attention, [T, D], bfloat16 or float32; the result has its dtype.
        delta: increment of the feed-forward, like `h`.
        table: [V, D], or [L, V, D] with `layer`; bfloat16 or float32, or packed by `pack_rows`.
            Never sliced nor copied.
        ids: int32 [T], each in [0, V). Not checked: an id outside counts as the nearest inside,
            or gives NaN where `jax_debug_nans` is on.
        scale: float32 [D].
        eps: added to the norm; a number, not traced.
        norm: "l2", or "rms" = l2 / sqrt(D).
        layer: int32 scalar in [0, L), index into a stacked table.
        plan: `row_plan(ids, num_rows=V)` of these very ids; made in the backward pass if None.
        row_grads: float32 zeros [U, D], of one layer; needs `plan`. Its cotangent is the gradient
            of each unique row, and the table itself gets none. None: the table gets a dense one.
        implementation: one of `IMPLEMENTATIONS`; None chooses by platform.

    Raises:
        ValueError: shapes or dtypes do not fit, or the implementation cannot run here.
    """
    check_stack("table", table, "V, D", layer)
    static = _static(
        Form(None, norm, eps), h, delta, table, ids, scale, row_grads, plan, implementation
    )
    at, inside = _at(layer, table), _clipped(ids, table.shape[-2])
    out = _jtok(static, *_varying_alike(h, delta, table, row_grads, scale, at, inside, plan))
    return _nan_where_outside(out, ids, table.shape[-2])


def jtok_m(
    h: jax.Array,
    delta: jax.Array,
    tables: jax.Array,
    ids: jax.Array,
    choice: jax.Array,
    weights: jax.Array,
    scale: jax.Array,
    *,
    depth_scale: float,
    eps: float,
    norm: str = "l2",
    layer: jax.Array | int | None = None,
    plan: RowPlan | None = None,
    row_grads: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Return h + delta + depth_scale * scale * Norm_eps(sum_k w_k tables[choice_k, ids]).

    arXiv 2602.00800 Eq. 11 to 13. Arguments as in `jtok`, and:

    Args:
        tables: [E, V, D], or [L, E, V, D] with `layer`.
        choice: int32 [T, K], tables each token reads, each in [0, E), 1 <= K <= E, no table twice.
        weights: float32 [T, K].
        depth_scale: 1/sqrt(2 N_l), a number.
        row_grads: float32 zeros [E, U, D].
    """
    if not isinstance(depth_scale, numbers.Real):
        raise ValueError(f"depth_scale is {depth_scale!r}; expected a number, 1/sqrt(2 N_l).")
    check_stack("tables", tables, "E, V, D", layer)
    check_choice(choice, weights, ids, tables.shape[-3])
    form, top_k = Form(depth_scale, norm, eps), choice.shape[1]
    static = _static(
        form, h, delta, tables, ids, scale, row_grads, plan, implementation, top_k=top_k
    )
    at, inside = _at(layer, tables), _clipped(ids, tables.shape[-2])
    choice = _clipped(choice, tables.shape[-3])
    arguments = h, delta, tables, row_grads, weights, scale, at, inside, choice, plan
    out = _jtok_m(static, *_varying_alike(*arguments))
    return _nan_where_outside(out, ids, tables.shape[-2])


def mix_rows(
    tables: jax.Array,
    ids: jax.Array,
    choice: jax.Array | None = None,
    weights: jax.Array | None = None,
    *,
    layer: jax.Array | int | None = None,
    plan: RowPlan | None = None,
    row_grads: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Return sum_k weights_k tables[choice_k, ids], Eq. 11, float32 [T, D].

    The part of `jtok` and `jtok_m` that a device can do for a slice of the columns of sharded
    tables; `norm_add` does the rest where whole rows are. Arguments as there; without `choice`
    and `weights` the tables are [V, D] or [L, V, D].
    """
    top_k = None
    if (choice is None) != (weights is None):
        raise ValueError("choice and weights go together: pass both, or neither.")
    check_stack("tables", tables, "V, D" if choice is None else "E, V, D", layer)
    if choice is not None:
        # More choices than tables: of those that lie elsewhere the weight is 0.
        check_choice(choice, weights, ids, max(tables.shape[-3], choice.shape[1]))
        top_k = choice.shape[1]
    check_rows(tables, ids, row_grads, plan, several=choice is not None)
    name = _implementation(implementation, tables, top_k, ids, weights, row_grads)
    static = _Static(Form(None, "l2", 0.0), name, row_grads is None)
    at, inside = _at(layer, tables), _clipped(ids, tables.shape[-2])
    choice = None if choice is None else _clipped(choice, tables.shape[-3])
    arguments = tables, row_grads, weights, at, inside, choice, plan
    out = _mix_rows(static, *_varying_alike(*arguments))
    return _nan_where_outside(out, ids, tables.shape[-2])


def norm_add(
    h: jax.Array,
    delta: jax.Array,
    e: jax.Array,
    scale: jax.Array,
    *,
    depth_scale: float | None,
    eps: float,
    norm: str = "l2",
) -> jax.Array:
    """Return what `jtok`, with depth_scale None, or `jtok_m` makes of mixed rows, [T, D].

    Args:
        e: rows or mixtures of rows, float32 [T, D].
    """
    check_stream(h, delta, scale)
    require(e.shape == h.shape and e.dtype == jnp.float32, "e", e, f"float32 {h.shape}")
    check_norm(norm)
    return reference.norm_add(h, delta, e, scale, depth_scale=depth_scale, norm=norm, eps=eps)


# ------------------------------------------------------------------------------ derivatives


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _jtok(static, h, delta, table, row_grads, scale, at, ids, plan):
    return backend(static.backend).jtok_forward(h, delta, table, at, ids, scale, static.form)


def _jtok_fwd(static, h, delta, table, row_grads, scale, at, ids, plan):
    out = _jtok(static, h, delta, table, row_grads, scale, at, ids, plan)
    return out, (delta, table, scale, at, ids, plan)


def _jtok_bwd(static, residuals, g):
    delta, table, scale, at, ids, plan = residuals
    plan = plan or row_plan(ids, num_rows=table.shape[-2])
    backward = backend(static.backend).jtok_backward
    grads = backward(g, delta, table, at, ids, scale, plan, static.form)
    d_delta, rows, d_scale = _nan_on_overflow(plan, *grads)
    return g, d_delta, *_table_or_rows(static, table, at, plan, rows), d_scale, None, None, None


_jtok.defvjp(_jtok_fwd, _jtok_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _jtok_m(static, h, delta, tables, row_grads, weights, scale, at, ids, choice, plan):
    forward = backend(static.backend).jtok_m_forward
    return forward(h, delta, tables, at, ids, choice, weights, scale, static.form)


def _jtok_m_fwd(static, h, delta, tables, row_grads, weights, scale, at, ids, choice, plan):
    out = _jtok_m(static, h, delta, tables, row_grads, weights, scale, at, ids, choice, plan)
    return out, (tables, weights, scale, at, ids, choice, plan)


def _jtok_m_bwd(static, residuals, g):
    tables, weights, scale, at, ids, choice, plan = residuals
    plan = plan or row_plan(ids, num_rows=tables.shape[-2])
    grads = backend(static.backend).jtok_m_backward(
        g, tables, at, ids, choice, weights, scale, plan, static.form
    )
    d_weights, rows, d_scale = _nan_on_overflow(plan, *grads)
    d_rows = _table_or_rows(static, tables, at, plan, rows)
    return g, g, *d_rows, d_weights, d_scale, None, None, None, None


_jtok_m.defvjp(_jtok_m_fwd, _jtok_m_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix_rows(static, tables, row_grads, weights, at, ids, choice, plan):
    return backend(static.backend).mix_rows_forward(tables, at, ids, choice, weights)


def _mix_rows_fwd(static, tables, row_grads, weights, at, ids, choice, plan):
    out = _mix_rows(static, tables, row_grads, weights, at, ids, choice, plan)
    return out, (tables, weights, at, ids, choice, plan)


def _mix_rows_bwd(static, residuals, d_e):
    tables, weights, at, ids, choice, plan = residuals
    plan = plan or row_plan(ids, num_rows=tables.shape[-2])
    backward = backend(static.backend).mix_rows_backward
    grads = backward(d_e, tables, at, ids, choice, weights, plan)
    d_weights, rows = _nan_on_overflow(plan, *grads)
    return *_table_or_rows(static, tables, at, plan, rows), d_weights, None, None, None, None


_mix_rows.defvjp(_mix_rows_fwd, _mix_rows_bwd)


def _nan_on_overflow(plan: RowPlan, *grads):
    """Return the gradients, each with its first entry NaN if the plan has no room for all ids.

    One entry says it at no cost: a norm over any of them is not finite.
    """
    if plan.overflow is None:
        return grads
    first = lambda x: x.at[(0,) * x.ndim].set(jnp.where(plan.overflow, jnp.nan, x[(0,) * x.ndim]))
    return jax.tree.map(first, grads)


def _table_or_rows(static: _Static, table, at, plan: RowPlan, rows):
    """Return the cotangents of (table, row_grads)."""
    if not static.dense:
        return None, rows
    if table.dtype == jnp.uint32:  # words have no gradient
        return None, None
    if rows.ndim == 3:
        at = (*at, jnp.arange(rows.shape[0])[:, None])
    zeros = jnp.zeros(table.shape, table.dtype)
    return zeros.at[(*at, plan.unique_U)].set(rows.astype(table.dtype), mode="drop"), None


# ---------------------------------------------------------------------------------- choices


def _static(
    form: Form, h, delta, table, ids, scale, row_grads, plan, implementation, *, top_k=None
) -> _Static:
    check_stream(h, delta, scale)
    require(width(table) == h.shape[1], "table", table, f"D = {h.shape[1]}, the width of h")
    require(ids.shape == h.shape[:1], "ids", ids, f"{h.shape[:1]}, one a token")
    check_rows(table, ids, row_grads, plan, several=top_k is not None)
    check_norm(form.norm)
    name = _implementation(implementation, table, top_k, h, delta, ids, scale, row_grads)
    return _Static(form, name, row_grads is None)


def _implementation(asked: str | None, table, top_k: int | None, *arguments) -> str:
    several = {} if top_k is None else {"num_tables": table.shape[-3], "top_k": top_k}
    name = choose(asked, dim=width(table), dtype=table.dtype, **several).name
    varying = lambda x: jax.typeof(x).manual_axis_type.varying
    if not name.startswith("mosaic_gpu") or not any(map(varying, jax.tree.leaves(arguments))):
        return name
    if asked is None:
        return "xla"
    raise ValueError(
        f"implementation {asked!r} cannot be traced where shard_map checks what varies over "
        "devices: pass it check_vma=False."
    )


def _at(layer, table) -> tuple[jax.Array, ...]:
    return () if layer is None else (_clipped(jnp.asarray(layer, jnp.int32), table.shape[0]),)


def _clipped(index: jax.Array, size: int) -> jax.Array:
    """Return ids within the table: reading outside would halt a chip, or read what is not ours."""
    return jnp.clip(index, 0, size - 1)


def _varying_alike(*arguments):
    """Return arguments that vary, in shard_map, over the mesh axes over which any of them does.

    A derivative of our own must have the type of its input; that of the cast sums over devices.
    """
    varying = lambda x: jax.typeof(x).manual_axis_type.varying
    axes = frozenset().union(*map(varying, jax.tree.leaves(arguments)))
    missing = lambda x: tuple(sorted(axes - varying(x)))
    cast = lambda x: jax.lax.pcast(x, missing(x), to="varying") if missing(x) else x
    return jax.tree.map(cast, arguments)


def _nan_where_outside(out: jax.Array, ids: jax.Array, num_rows: int) -> jax.Array:
    if not jax.config.jax_debug_nans:
        return out
    return jnp.where(((ids >= 0) & (ids < num_rows))[:, None], out, jnp.nan)
