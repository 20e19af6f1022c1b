# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The operations and the update at real widths against float64: python benchmarks/correctness.py

Every result is compared with numpy in float64 from the same inputs, as the kernels hold them. The
error is the root mean square of the difference over that of the result. A result fails if its error
exceeds LIMITS. The process ends with 1 if any fails.
"""

import argparse
import functools
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
from baselines import BACKWARD
from cases import FORMS, KINDS, Case, Shape, backward_of, forward_of, make_cases
from jtok_kernels import choose, lazy_adam, update_rows
from jtok_kernels.choose import backend
from timing import device_line, record, say

# bfloat16 keeps 8 bits: rounding once errs by 2^-9 at most, by 0.0017 on average of random values.
LIMITS = {"bfloat16": 3e-3, "float32": 2e-5}
B1, B2, EPS, RATE = 0.9, 0.95, 1e-8, 0.01


def reference(case: Case) -> dict[str, np.ndarray]:
    """Return every result in float64, one formula a line; rows are [V, D] or [E, V, D]."""
    f64 = lambda x: np.asarray(x, np.float64)
    h, delta, g, table, scale = map(f64, (case.h, case.delta, case.g, case.table, case.scale))
    ids, eps = np.asarray(case.ids), FORMS["jtok"].eps
    if case.choice is None:
        e = table[ids]
    else:
        choice, weights = np.asarray(case.choice), f64(case.weights)
        each = table[choice, ids[:, None]]
        e = np.einsum("tk,tkd->td", weights, each)
    n = np.linalg.norm(e, axis=1, keepdims=True)
    normed = e / (n + eps)
    pull = lambda a: a / (n + eps) - e * np.sum(a * e, 1, keepdims=True) / (n * (n + eps) ** 2)
    rows = np.zeros(table.shape)
    if case.choice is None:
        gate = 1 + scale * normed
        np.add.at(rows, ids, pull(g * delta * scale))
        out = {"out": h + delta * gate, "first": g * gate, "rows": rows}
        return out | {"scale": np.sum(g * delta * normed, axis=0)}
    c = FORMS["jtok_m"].depth_scale
    q = pull(c * scale * g)
    np.add.at(rows, (choice, ids[:, None]), weights[..., None] * q[:, None])
    out = {"out": h + delta + c * scale * normed, "first": np.einsum("td,tkd->tk", q, each)}
    return out | {"rows": rows, "scale": np.sum(c * g * normed, axis=0)}


def results(case: Case, forward, backward) -> dict[str, np.ndarray]:
    """Return the same of an implementation: functions of a case."""
    first, rows, scale = jax.jit(backward)(case)
    if rows.shape != case.table.shape:
        unique_U = case.plan.unique_U
        dense = jnp.zeros((*case.table.shape[:-1], rows.shape[-1]), jnp.float32)
        rows = dense.at[..., unique_U, :].set(rows, mode="drop")
    found = {"out": jax.jit(forward)(case), "first": first, "rows": rows, "scale": scale}
    return {name: np.asarray(value, np.float64) for name, value in found.items()}


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return rms(found - wanted) / rms(wanted)."""
    return float(np.sqrt(np.mean((found - wanted) ** 2) / np.mean(wanted**2)))


def limit(name: str, case: Case) -> float:
    """Return the limit of one result; sums of products of float32 stay float32."""
    rounded = {"out": case.h.dtype, "first": case.delta.dtype if case.choice is None else None}
    return LIMITS[str(rounded.get(name) or "float32")]


def check_operation(kind: str, shape: Shape, name: str) -> bool:
    """Print the errors of forward and backward of one implementation; True if all are small."""
    case = make_cases(kind, shape, "zipf", seed=1, count=1)[0]
    functions = backend(name)
    calls = [functools.partial(call, functions) for call in (forward_of, backward_of)]
    wanted, good = reference(case), True
    for result, found in results(case, *calls).items():
        good &= told(f"{kind} {result}", name, shape, error(found, wanted[result]),
                     limit(result, case))  # fmt: skip
    return good


def told(what: str, name: str, shape: Shape, found: float, most: float) -> bool:
    """Print and record one error; return whether it is within its limit."""
    good = found <= most
    verdict = "ok" if good else "WRONG"
    say(f"{what:20}{name:24}{shape.dim:6}{shape.tokens:7}{found:12.2e}{most:10.0e}  {verdict}")
    record(table="correctness", name=what, arm=name, dim=shape.dim, error=found, good=good)
    return good


def check_update(shape: Shape, name: str) -> bool:
    """Print the errors of two steps of lazy_adam on a float32 table; the rest must not move."""
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.standard_normal((shape.rows, shape.dim)), jnp.float32)
    unique = np.sort(rng.choice(shape.rows, shape.rows // 8, replace=False)).astype(np.int32)
    grads = [jnp.asarray(rng.standard_normal((unique.size, shape.dim)), jnp.float32)] * 2
    grads[1] = grads[1][::-1]
    optimizer = lazy_adam(b1=B1, b2=B2, eps=EPS, weight_decay=0.0)
    update = jax.jit(functools.partial(update_rows, optimizer, implementation=name))
    held = table, optimizer.init(table)
    rows, m, v = np.float64(table)[unique], 0.0, 0.0
    for step, grad in enumerate(grads, start=1):
        options = {"step": jnp.int32(step), "learning_rate": jnp.float32(RATE)}
        held = update(*held, jnp.asarray(unique), grad, **options)
        m, v = B1 * m + (1 - B1) * np.float64(grad), B2 * v + (1 - B2) * np.float64(grad) ** 2
        rows = rows - RATE * (m / (1 - B1**step)) / (np.sqrt(v / (1 - B2**step)) + EPS)
    moved = np.float64(held[0])[unique] - np.float64(table)[unique]
    wanted = rows - np.float64(table)[unique]
    # A step of 0.01 on entries near 1: float32 keeps 24 bits of the sum, 17 of the step.
    good = told("lazy_adam", name, shape, error(moved, wanted), 1e-4)
    others = np.delete(np.arange(shape.rows), unique)
    if not np.array_equal(np.asarray(held[0])[others], np.asarray(table)[others]):
        say(f"lazy_adam {name}: rows moved that no token uses  WRONG")
        return False
    return good


def check_baselines(kind: str, shape: Shape) -> bool:
    """Print the errors of the plain baselines that the kernels are compared with."""
    case = make_cases(kind, shape, "zipf", seed=1, count=1)[0]
    wanted, good = reference(case), True
    for name, backward in BACKWARD.items():
        # The dense gradient of `plain` is summed in the dtype of the table.
        rounded = {"rows": 16 * LIMITS[shape.dtype]} if name == "plain" else {}
        found = results(case, lambda case: case.h, backward)
        for result in ("first", "rows", "scale"):
            most = rounded.get(result, limit(result, case))
            good &= told(f"{kind} {result}", name, shape, error(found[result], wanted[result]),
                         most)  # fmt: skip
    return good


def main() -> int:
    numbers = lambda text: [int(part) for part in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dims", type=numbers, default=[768, 1536, 2048])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=4096, help="V")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--implementation", help="default: what this device takes")
    options = parser.parse_args()
    say("command ", shlex.join(["python", *sys.argv]))
    say("device  ", device_line())
    say(f"\n{'result':20}{'arm':24}{'D':>6}{'T':>7}{'error':>12}{'limit':>10}")
    good = True
    for dim in options.dims:
        shape = Shape(options.tokens, dim, options.rows, dtype=options.dtype)
        name = choose(options.implementation, dim=dim, dtype=jnp.dtype(options.dtype)).name
        for kind in KINDS:
            good &= check_operation(kind, shape, name)
        good &= check_update(shape, name)
    for kind in KINDS:
        good &= check_baselines(kind, Shape(options.tokens, 256, 1024, dtype=options.dtype))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
