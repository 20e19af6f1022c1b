# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Inputs of the table operations as training has them, and the least bytes that each must move."""

import functools
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jtok_kernels import RowPlan, row_plan
from jtok_kernels.form import Form

KINDS = ("jtok", "jtok_m")
FORMS = {"jtok": Form(None, "l2", 1e-6), "jtok_m": Form(0.2, "l2", 1e-6)}
ROTATE = 160 << 20  # bytes of streams in all sets of a GPU: more than twice its L2 cache
MOST_CASES = 8


class Shape(NamedTuple):
    """The sizes of a layer's operation."""

    tokens: int
    dim: int
    rows: int  # V
    tables: int = 5  # E of JTok-M
    top_k: int = 2  # K of JTok-M
    dtype: str = "bfloat16"


class Case(NamedTuple):
    """The arrays of one call."""

    h: jax.Array  # [T, D]
    delta: jax.Array
    g: jax.Array  # cotangent of the result
    table: jax.Array  # [V, D], or [E, V, D] of JTok-M
    ids: jax.Array
    choice: jax.Array | None  # [T, K]; None: JTok
    weights: jax.Array | None
    scale: jax.Array
    plan: RowPlan


def make_ids(kind: str, count: int, num_rows: int, seed: int) -> np.ndarray:
    """Return int32 [count] ids of one kind.

    zipf: Zipf's law (s = 1.07), frequent ids first, as tokenizers number them
    permuted: the same law, ids scattered over the table
    uniform: all ids alike
    Anything else is the folder of a prepared corpus.
    """
    rng = np.random.default_rng(seed)
    if kind == "uniform":
        return rng.integers(0, num_rows, count, dtype=np.int32)
    if kind in ("zipf", "permuted"):
        weights = 1.0 / (np.arange(num_rows) + 2.7) ** 1.07
        ids = rng.choice(num_rows, count, p=weights / weights.sum()).astype(np.int32)
        return np.random.default_rng(0).permutation(num_rows).astype(np.int32)[ids] if (
            kind == "permuted") else ids  # fmt: skip
    return _corpus_ids(kind, count, num_rows, seed)


def _corpus_ids(folder: str, count: int, num_rows: int, seed: int) -> np.ndarray:
    from jtok_jax.config import Config, DataConfig, TrainConfig
    from jtok_jax.data.loader import open_source
    from jtok_jax.model_config import ModelConfig

    manifest = json.loads((pathlib.Path(folder) / "manifest.json").read_text())
    length, vocab = manifest["seq_len"], manifest["vocab_size"]
    if vocab > num_rows:
        raise SystemExit(f"{folder} has {vocab} entries; pass --rows of at least that many.")
    config = Config(
        model=ModelConfig(vocab_size=vocab),
        train=TrainConfig(batch_size=-(-count // length), seq_len=length, seed=seed),
        data=DataConfig(path=folder, verify="size"),
    )
    return open_source(config).sequences(1).reshape(-1)[:count].astype(np.int32)


def num_cases(shape: Shape) -> int:
    """Return how many input sets exceed the cache of a GPU together; two elsewhere."""
    if jax.default_backend() != "gpu":
        return 2
    streams = 3 * shape.tokens * shape.dim * jnp.dtype(shape.dtype).itemsize
    return int(np.clip(-(-ROTATE // streams), 2, MOST_CASES))


_plan = jax.jit(row_plan, static_argnames=("num_rows", "max_unique"))  # compiled once a shape


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: jax.Array, sizes: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(key, sizes, jnp.dtype(dtype))


def make_cases(kind: str, shape: Shape, ids_kind: str, seed: int, count: int = 0) -> list[Case]:
    """Return input sets of equal shapes; they take two tables in turn."""
    count = count or num_cases(shape)
    drawn = [make_ids(ids_kind, shape.tokens, shape.rows, seed + i) for i in range(count)]
    # Room for a tenth more different ids than there are, as one would pass max_unique_ids.
    room = int(1.1 * max(np.unique(ids).size for ids in drawn)) + 1
    several = (shape.tables,) if kind == "jtok_m" else ()
    draw = lambda key, *sizes: _draw(key, sizes, shape.dtype)
    key = jax.random.key(seed)
    tables = [draw(jax.random.fold_in(key, i), *several, shape.rows, shape.dim) for i in (0, 1)]
    cases = []
    for index, ids in enumerate(drawn):
        keys = jax.random.split(jax.random.fold_in(key, 2 + index), 6)
        h, delta, g = (draw(one, shape.tokens, shape.dim) for one in keys[:3])
        choice = weights = None
        if kind == "jtok_m":
            order = jnp.argsort(jax.random.uniform(keys[3], (shape.tokens, shape.tables)), axis=1)
            choice = order[:, : shape.top_k].astype(jnp.int32)
            weights = jax.random.uniform(keys[4], choice.shape, minval=0.1)
        scale = jax.random.normal(keys[5], (shape.dim,))
        ids = jnp.asarray(ids)
        plan = _plan(ids, num_rows=shape.rows, max_unique=room)
        cases.append(Case(h, delta, g, tables[index % 2], ids, choice, weights, scale, plan))
    return cases


def unique_rows(case: Case) -> int:
    """Return how many different rows a call reads: ids, or (table, id) places of JTok-M."""
    ids = np.asarray(case.ids, np.int64)
    if case.choice is None:
        return np.unique(ids).size
    num_rows = case.table.shape[-2]
    return np.unique(np.asarray(case.choice) * num_rows + ids[:, None]).size


def floor_bytes(case: Case, direction: str) -> int:
    """Return the least bytes of a call: every array once, a row once however often it is used.

    forward: h, delta and the result; the unique rows.
    backward of JTok: g, delta and the gradient of delta; the unique rows and their gradients.
    backward of JTok-M: g; the unique rows and their gradients.
    Row gradients are float32. Zeros for rows that no token uses are not counted: a better interface
    would not write them.
    """
    tokens, dim = case.h.shape
    stream = tokens * dim * case.h.dtype.itemsize
    row, count = dim * case.table.dtype.itemsize, unique_rows(case)
    if direction == "forward":
        return 3 * stream + count * row
    streams = 3 if case.choice is None else 1
    return streams * stream + count * (row + 4 * dim)


def forward_of(functions, case: Case) -> jax.Array:
    """Call the forward pass of one implementation."""
    if case.choice is None:
        arguments = case.h, case.delta, case.table, (), case.ids
        return functions.jtok_forward(*arguments, case.scale, FORMS["jtok"])
    arguments = case.h, case.delta, case.table, (), case.ids, case.choice, case.weights
    return functions.jtok_m_forward(*arguments, case.scale, FORMS["jtok_m"])


def backward_of(functions, case: Case):
    """Call the backward pass: (gradient of delta or of weights, of rows, of scale)."""
    if case.choice is None:
        arguments = case.g, case.delta, case.table, (), case.ids, case.scale, case.plan
        return functions.jtok_backward(*arguments, FORMS["jtok"])
    arguments = case.g, case.table, (), case.ids, case.choice, case.weights, case.scale, case.plan
    return functions.jtok_m_backward(*arguments, FORMS["jtok_m"])
