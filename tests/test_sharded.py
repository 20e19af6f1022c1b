# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The operations inside shard_map, on eight simulated devices in a process of its own."""

import os
import re
import subprocess
import sys

from conftest import ROOT

STEP = """
arguments = jnp.int32(51), ids, h, delta, target
found, expected = (run(scale, table, state, *arguments) for run in (split_step, train_step))
assert jax.device_count() == 8
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
assert np.any(found[2] != table)
print("equal")
"""
SCRIPT = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from jtok_kernels import jtok, jtok_m, mix_rows, norm_add, row_plan

mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
rng = np.random.default_rng(0)
draw = lambda *shape: jnp.float32(rng.standard_normal(shape))
T, D, V, E, K = 16, 32, 11, 3, 2
h, delta, tables, scale = draw(T, D), draw(T, D), draw(E, V, D), draw(D)
weights, ids = draw(T, K), jnp.int32(rng.integers(0, V, T))
choice = jnp.int32(np.argsort(rng.random((T, E)), axis=1)[:, :K])
plan = row_plan(ids, num_rows=V)
zeros = jnp.zeros((E, plan.unique_U.size, D))
form = {"eps": 0.1, "depth_scale": 0.3}

def whole(weights, scale, zeros):
    out = jtok_m(h, delta, tables, ids, choice, weights, scale, plan=plan, row_grads=zeros, **form)
    return jnp.sum(jnp.square(out))

def by_columns(weights, scale, zeros):
    mix = lambda tables, zeros, weights: mix_rows(
        tables, ids, choice, weights, plan=plan, row_grads=zeros
    )
    columns = P(None, None, "x")
    e = jax.shard_map(mix, mesh=mesh, in_specs=(columns, columns, P()), out_specs=P(None, "x"))
    return jnp.sum(jnp.square(norm_add(h, delta, e(tables, zeros, weights), scale, **form)))

def by_tokens(delta, scale):
    f = lambda h, delta, ids, table, scale: jtok(h, delta, table, ids, scale, eps=0.1)
    x = P("x")
    f = jax.shard_map(f, mesh=mesh, in_specs=(x, x, x, P(), P()), out_specs=x)
    return jnp.sum(jnp.square(f(h, delta, ids, tables[0], scale)))

def plain(delta, scale):
    return jnp.sum(jnp.square(jtok(h, delta, tables[0], ids, scale, eps=0.1)))

for ours, reference, arguments in (
    (by_columns, whole, (weights, scale, zeros)),
    (by_tokens, plain, (delta, scale)),
):
    numbers = tuple(range(len(arguments)))
    value = lambda f: jax.jit(jax.value_and_grad(f, argnums=numbers))(*arguments)
    results = [value(ours), value(reference)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *results)
    assert all(np.any(np.asarray(g) != 0) for g in results[0][1])
print("equal")
"""


def test_operations_are_differentiable_in_shard_map():
    """With JAX's own check of what varies over devices; gradients of what is replicated add up."""
    run_on_eight_devices(SCRIPT)


def test_the_split_step_of_the_documents_is_that_of_one_device():
    text = (ROOT / "kernels" / "README.md").read_text()
    whole, split = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    run_on_eight_devices(f"import numpy as np\n{whole}\n{split}\n{STEP}")


def run_on_eight_devices(script: str) -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"XLA_FLAGS": flags} | paths,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "equal" in done.stdout
