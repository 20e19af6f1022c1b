# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The table operations as a good hand would write them in plain JAX, for the kernels to beat.

Functions of a `Case`, with the results of the kernels:
  forward              the stream [T, D]
  backward of JTok     (gradient of delta, row gradients [U, D], gradient of scale)
  backward of JTok-M   (gradient of weights, row gradients [E, U, D], gradient of scale)
`plain` returns a dense gradient of the table instead of row gradients.
"""

import jax
import jax.numpy as jnp
from cases import FORMS, Case
from jtok_kernels import reference


def plain_forward(case: Case) -> jax.Array:
    """Gather, normalise, gate, add: XLA fuses what it can."""
    return _forward(case, case.delta, case.table, case.weights, case.scale)


def plain_backward(case: Case):
    """Autodiff of `plain_forward`; the table gets a dense gradient, made of zeros and a scatter."""
    arguments = case.delta, case.table, case.weights, case.scale
    _, pull = jax.vjp(lambda *args: _forward(case, *args), *arguments)
    d_delta, d_table, d_weights, d_scale = pull(case.g)
    return (d_delta if case.choice is None else d_weights), d_table, d_scale


def atomics_backward(case: Case):
    """One scatter-add into the rows of the step; on a GPU with atomics, in any order."""
    place, count = case.plan.order.place, case.plan.unique_U.size
    dim = case.h.shape[1]
    if case.choice is None:
        zeros = jnp.zeros((count, dim), jnp.float32)
        return _jtok_backward(case, zeros.at[place].add(_products(case)))
    d_weights, d_e_TD, d_scale = _jtok_m_tokens(case)
    zeros = jnp.zeros((case.table.shape[0], count, dim), jnp.float32)
    values_TKD = case.weights[..., None] * d_e_TD[:, None]
    return d_weights, zeros.at[case.choice, place[:, None]].add(values_TKD), d_scale


def segment_backward(case: Case):
    """Sorted sums by the order that the plan holds already; JTok-M one table after another."""
    token, place = case.plan.order.token, case.plan.order.place[case.plan.order.token]
    count = case.plan.unique_U.size
    total = lambda values_TD: jax.ops.segment_sum(
        values_TD[token], place, count, indices_are_sorted=True
    )
    if case.choice is None:
        return _jtok_backward(case, total(_products(case)))
    d_weights, d_e_TD, d_scale = _jtok_m_tokens(case)
    weight_of = lambda table: jnp.sum(
        jnp.where(case.choice == table, case.weights, 0.0), axis=1, keepdims=True
    )
    rows = [total(weight_of(table) * d_e_TD) for table in range(case.table.shape[0])]
    return d_weights, jnp.stack(rows), d_scale


BACKWARD = {"plain": plain_backward, "segment": segment_backward, "atomics": atomics_backward}


def _forward(case: Case, delta, table, weights, scale):
    if case.choice is None:
        e_TD = table[case.ids].astype(jnp.float32)
        return reference.norm_add(case.h, delta, e_TD, scale, **FORMS["jtok"]._asdict())
    rows_TKD = table[case.choice, case.ids[:, None]].astype(jnp.float32)
    e_TD = reference.mix(rows_TKD, weights)
    return reference.norm_add(case.h, delta, e_TD, scale, **FORMS["jtok_m"]._asdict())


def _products(case: Case) -> jax.Array:
    return case.delta.astype(jnp.float32) * case.g.astype(jnp.float32)


def _norm(form):
    return lambda e: reference.norm_eps(e, norm=form.norm, eps=form.eps)


def _jtok_backward(case: Case, sums_UD):
    """The derivative of the norm is taken once a row, from the sums over its tokens."""
    form, unique_U = FORMS["jtok"], case.plan.unique_U
    e_TD = case.table[case.ids].astype(jnp.float32)
    gate_TD = reference.gate(e_TD, case.scale, norm=form.norm, eps=form.eps)
    d_delta = (case.g.astype(jnp.float32) * gate_TD).astype(case.delta.dtype)
    e_UD = case.table[jnp.minimum(unique_U, case.table.shape[0] - 1)].astype(jnp.float32)
    normed_UD, pull = jax.vjp(_norm(form), e_UD)
    (rows_UD,) = pull(case.scale * sums_UD)
    return d_delta, rows_UD, jnp.sum(sums_UD * normed_UD, axis=0)


def _jtok_m_tokens(case: Case):
    """(gradient of weights [T, K], of mixtures [T, D], of scale [D])."""
    form = FORMS["jtok_m"]
    rows_TKD = case.table[case.choice, case.ids[:, None]].astype(jnp.float32)
    e_TD = reference.mix(rows_TKD, case.weights)
    normed_TD, pull = jax.vjp(_norm(form), e_TD)
    g = form.depth_scale * case.g.astype(jnp.float32)
    (d_e_TD,) = pull(case.scale * g)
    return jnp.sum(d_e_TD[:, None] * rows_TKD, axis=-1), d_e_TD, jnp.sum(g * normed_TD, axis=0)
