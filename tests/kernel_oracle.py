# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""jtok and jtok_m with their gradients in float64 numpy, token by token; and inputs to compare on.

Derivatives are written out by hand; test_modulate.py checks them against differences of the
forward functions.
"""

from typing import NamedTuple

import numpy as np


class Inputs(NamedTuple):
    """float64 arrays, already rounded to what an implementation gets."""

    h: np.ndarray
    delta: np.ndarray
    tables: np.ndarray  # [E, V, D]; jtok reads tables[0]
    ids: np.ndarray
    choice: np.ndarray
    weights: np.ndarray
    scale: np.ndarray
    g: np.ndarray  # cotangent of the output


class Grads(NamedTuple):
    delta: np.ndarray
    tables: np.ndarray
    weights: np.ndarray
    scale: np.ndarray


def _norm(e, norm, eps):
    """(n + eps, n, share of every entry in the derivative of n)."""
    kappa = {"l2": 1.0, "rms": 1.0 / e.size}[norm]
    n = np.sqrt(kappa * np.sum(e * e))
    return n + eps, n, kappa


def _pull(a, e, norm, eps):
    """J^T a of e -> e / (n + eps)."""
    m, n, kappa = _norm(e, norm, eps)
    radial = 0.0 if n == 0 else kappa * (e @ a) / (n * m * m)
    return a / m - radial * e


def jtok(x: Inputs, *, norm: str, eps: float) -> np.ndarray:
    out = np.zeros(x.h.shape)
    for t, token in enumerate(x.ids):
        e = x.tables[0, token]
        out[t] = x.h[t] + x.delta[t] * (1 + x.scale * e / _norm(e, norm, eps)[0])
    return out


def jtok_grads(x: Inputs, *, norm: str, eps: float) -> Grads:
    delta, tables = np.zeros(x.delta.shape), np.zeros(x.tables.shape)
    scale = np.zeros(x.scale.shape)
    for t, token in enumerate(x.ids):
        e = x.tables[0, token]
        normed = e / _norm(e, norm, eps)[0]
        delta[t] = x.g[t] * (1 + x.scale * normed)
        scale += x.g[t] * x.delta[t] * normed
        tables[0, token] += _pull(x.g[t] * x.delta[t] * x.scale, e, norm, eps)
    return Grads(delta, tables, np.zeros(x.weights.shape), scale)


def jtok_m(x: Inputs, *, depth_scale: float, norm: str, eps: float) -> np.ndarray:
    out = np.zeros(x.h.shape)
    for t, token in enumerate(x.ids):
        e = sum(w * x.tables[c, token] for c, w in zip(x.choice[t], x.weights[t], strict=True))
        out[t] = x.h[t] + x.delta[t] + depth_scale * x.scale * e / _norm(e, norm, eps)[0]
    return out


def jtok_m_grads(x: Inputs, *, depth_scale: float, norm: str, eps: float) -> Grads:
    tables, weights, scale = (np.zeros(a.shape) for a in (x.tables, x.weights, x.scale))
    for t, token in enumerate(x.ids):
        rows = x.tables[x.choice[t], token]
        e = x.weights[t] @ rows
        scale += depth_scale * x.g[t] * e / _norm(e, norm, eps)[0]
        q = _pull(depth_scale * x.scale * x.g[t], e, norm, eps)
        for k, table in enumerate(x.choice[t]):
            weights[t, k] = q @ rows[k]
            tables[table, token] += x.weights[t, k] * q
    return Grads(x.g.copy(), tables, weights, scale)
