# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""python benchmarks/table_forms.py: four ways to read per-layer tables in a scan over layers.

    sliced       the scan slices [L, V, D] layer by layer; autodiff
    closed over  rows gathered from the whole stack in the scan; autodiff
    rows first   the rows of all layers gathered before the scan; autodiff
    row grads    as closed over, but row gradients leave through jtok_kernels.gather_rows

Each computes a loss and the dense gradient of the tables; forward alone as well. Printed: compiled
temporary bytes in tables of one layer, and the median over rounds of the time against "row grads",
one call of each in turn.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jtok_kernels import dense_gradient, gather_rows, row_plan


def layer(h_RD, row_RD, weight_DD):
    """A block in miniature: a matmul increment gated by the normalised row."""
    unit = row_RD * jax.lax.rsqrt(jnp.mean(jnp.square(row_RD), axis=-1, keepdims=True) + 1e-6)
    return h_RD + jnp.tanh(h_RD @ weight_DD) * (1.0 + unit)


def sliced(tables_LMVD, h_RD, weights_LDD, ids_R):
    body = lambda h, xs: (layer(h, xs[0][0, ids_R], xs[1]), None)
    return jnp.mean(jnp.square(jax.lax.scan(body, h_RD, (tables_LMVD, weights_LDD))[0]))


def closed_over(tables_LMVD, h_RD, weights_LDD, ids_R):
    body = lambda h, xs: (layer(h, tables_LMVD[xs[0], 0, ids_R], xs[1]), None)
    layers = jnp.arange(len(tables_LMVD))
    return jnp.mean(jnp.square(jax.lax.scan(body, h_RD, (layers, weights_LDD))[0]))


def rows_first(tables_LMVD, h_RD, weights_LDD, ids_R):
    body = lambda h, xs: (layer(h, *xs), None)
    rows_LRD = tables_LMVD[:, 0, ids_R]
    return jnp.mean(jnp.square(jax.lax.scan(body, h_RD, (rows_LRD, weights_LDD))[0]))


def row_grads_loss(row_grads_LMUD, tables_LMVD, h_RD, weights_LDD, ids_R, place_R):
    choice_Rk = jnp.zeros((ids_R.size, 1), jnp.int32)

    def body(h, xs):
        stack, row_grads_MUD, weight = xs
        rows = gather_rows(tables_LMVD, row_grads_MUD, stack, choice_Rk, ids_R, place_R)
        return layer(h, rows[:, 0], weight), None

    xs = jnp.arange(len(tables_LMVD)), row_grads_LMUD, weights_LDD
    return jnp.mean(jnp.square(jax.lax.scan(body, h_RD, xs)[0]))


def row_grads_gradient(tables_LMVD, h_RD, weights_LDD, ids_R):
    num_layers, _, num_rows, dim = tables_LMVD.shape
    plan = row_plan(ids_R, num_rows=num_rows)
    zeros = jnp.zeros((num_layers, 1, plan.unique_U.size, dim))
    value, grads = jax.value_and_grad(row_grads_loss)(
        zeros, tables_LMVD, h_RD, weights_LDD, ids_R, plan.place
    )
    stacks = tuple(range(num_layers))
    dense = dense_gradient(grads, plan.unique_U, stack_of_layer=stacks, num_rows=num_rows)
    return value, dense


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name, default in {
        "vocab": 32768,
        "dim": 128,
        "layers": 8,
        "tokens": 2048,
        "rounds": 30,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.float32(rng.standard_normal(shape))
    tables = draw(options.layers, 1, options.vocab, options.dim)
    h, weights = (
        draw(options.tokens, options.dim),
        draw(options.layers, options.dim, options.dim) / 9,
    )
    ids = np.exp(rng.random(options.tokens) * np.log(options.vocab)).astype(np.int32) - 1
    arguments = tables, h, weights, jnp.asarray(ids)
    forward = {f.__name__: f for f in (sliced, closed_over, rows_first)}
    gradients = {name: jax.value_and_grad(f) for name, f in forward.items()}
    gradients["row_grads"] = row_grads_gradient
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}, float32, {vars(options)}")
    one_table = options.vocab * options.dim * 4
    compiled = {name: jax.jit(f).lower(*arguments).compile() for name, f in gradients.items()}
    values = {name: f(*arguments) for name, f in compiled.items()}
    for name, (value, grads) in values.items():
        np.testing.assert_allclose(value, values["rows_first"][0], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(grads, values["rows_first"][1], atol=1e-6, err_msg=name)
    times = {name: [] for name in compiled}
    for _ in range(options.rounds):
        for name, function in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            times[name].append(time.perf_counter() - start)
    print(f"{'form':<12} {'forward temp':>13} {'gradient temp':>14} {'ms':>8} {'ratio':>6}")
    for name, function in compiled.items():
        base = [a / b for a, b in zip(times[name], times["row_grads"], strict=True)]
        temp = function.memory_analysis().temp_size_in_bytes / one_table
        before = "as closed"
        if name in forward:
            whole = jax.jit(forward[name]).lower(*arguments).compile().memory_analysis()
            before = f"{whole.temp_size_in_bytes / one_table:.2f}"
        milliseconds, ratio = 1000 * statistics.median(times[name]), statistics.median(base)
        print(f"{name:<12} {before:>13} {temp:>14.2f} {milliseconds:>8.1f} {ratio:>6.2f}")


if __name__ == "__main__":
    main()
