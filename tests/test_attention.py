# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Kinds of attention against one written out here, and which of them runs where."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import DENSE

from jtok_jax.config import Config
from jtok_jax.errors import ConfigError
from jtok_jax.model import attention
from jtok_jax.model.attention import QUERIES, SIMULATED, causal, choose
from jtok_jax.model.params import bind, init_params
from jtok_jax.training.metrics import parameter_table


@pytest.mark.parametrize("length", [1, 7, QUERIES, QUERIES + 3, 2 * QUERIES])
def test_chunks_equal_the_whole(length):
    rng = np.random.default_rng(length)
    draw = lambda heads: jnp.float32(rng.standard_normal((2, length, heads, 8)))
    query, key, value, weights = draw(4), draw(2), draw(2), draw(4)

    def loss(kind, *arrays):
        return jnp.sum(weights * causal(*arrays, kind=kind))

    value_and_grad = jax.jit(jax.value_and_grad(loss, argnums=(1, 2, 3)), static_argnums=0)
    expected, found = (value_and_grad(kind, query, key, value) for kind in ("xla", "chunked"))
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, expected, found)


def test_a_neutral_stretch_of_rotations_changes_no_bit():
    ids = jnp.arange(21).reshape(3, 7)
    plain, neutral = DENSE, dataclasses.replace(DENSE, rope_scaling="linear:1")
    params = init_params(plain, jax.random.key(0))
    run = jax.jit(lambda model, params: bind(model, params)(ids).hidden_BTD, static_argnums=0)
    np.testing.assert_array_equal(run(plain, params), run(neutral, params))
    stretched = dataclasses.replace(DENSE, rope_scaling="linear:1.5")
    assert np.any(run(plain, params) != run(stretched, params))


def test_chunks_take_less_memory():
    shape = jax.ShapeDtypeStruct((1, 4 * QUERIES, 2, 8), jnp.float32)

    def temporaries(kind):
        run = jax.jit(jax.grad(lambda *x: jnp.sum(causal(*x, kind=kind) ** 2), argnums=(0, 1, 2)))
        return run.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("chunked") < 0.4 * temporaries("xla")


def written_out(query_BTNH, key_BTKH, value_BTKH, segment_ids_BT):
    """Return causal attention of float32 arrays by its definition, all T x T at once."""
    group = query_BTNH.shape[2] // key_BTKH.shape[2]
    key, value = (jnp.repeat(x, group, axis=2) for x in (key_BTKH, value_BTKH))
    scores = jnp.einsum("btnh,bsnh->bnts", query_BTNH, key) / np.sqrt(query_BTNH.shape[-1])
    places = jnp.arange(query_BTNH.shape[1])
    seen = (places[:, None] >= places)[None]
    if segment_ids_BT is not None:
        seen = seen & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None])
    shares = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", shares, value)


@pytest.mark.parametrize(("kind", "dtype", "length", "segmented"), [
    (SIMULATED, "float32", 384, False), (SIMULATED, "float32", 768, True),
    (SIMULATED, "bfloat16", 384, True), (SIMULATED, "bfloat16", 256, False),
    ("xla", "float32", 384, True), ("chunked", "float32", QUERIES + 3, True),
])  # fmt: skip
def test_a_kind_equals_attention_written_out(kind, dtype, length, segmented):
    """Values and gradients; one or three blocks of tokens, two heads to a key."""
    rng = np.random.default_rng(length)
    draw = lambda heads: jnp.asarray(rng.standard_normal((2, length, heads, 64)), dtype)
    query, key, value, weights = draw(4), draw(2), draw(2), draw(4).astype("float32")
    starts = rng.random((2, length)) < 4 / length
    segments = jnp.asarray(starts.cumsum(axis=1), jnp.int32) if segmented else None

    @functools.partial(jax.jit, static_argnums=0)
    def run(attend, *arrays):
        def loss(*arrays):
            mixed = attend(*arrays, segment_ids_BT=segments).astype("float32")
            return jnp.sum(weights * mixed), mixed

        (_, mixed), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*arrays)
        return mixed, *gradients

    found = run(functools.partial(causal, kind=kind), query, key, value)
    expected = run(written_out, *(x.astype("float32") for x in (query, key, value)))
    error = 1e-5 if dtype == "float32" else 0.01
    for name, one, other in zip(("mixed", "query", "key", "value"), found, expected, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.abs(one - other).max() < error * np.abs(other).max(), name
        assert np.linalg.norm(one - other) < error * np.linalg.norm(other), name


@pytest.mark.parametrize(("device", "fields", "kind", "reason"), [
    ("TPU v5 lite", {}, "splash", "TPU v5 lite"),
    ("TPU v5 lite", {"dtype": "float32"}, "splash", "TPU v5 lite"),
    ("TPU v6 lite", {"length": 2000}, "xla", "2000 tokens; splash attention takes multiples of"),
    ("TPU v6 lite", {"length": 64}, "xla", "64 tokens; splash attention takes multiples of 128"),
    ("TPU v5", {"head_size": 512}, "xla", "the head size is 512"),
    ("TPU v5", {"dtype": "float16"}, "xla", "the dtype is float16"),
    ("TPU v5", {"placed": False}, "xla", "XLA cannot split splash attention over devices"),
    ("cpu", {}, "xla", "cpu is not an NVIDIA GPU"),
])  # fmt: skip
def test_auto_says_what_it_takes_and_why(monkeypatch, device, fields, kind, reason):
    monkeypatch.setattr(attention, "_device_kind", lambda: device)
    fields = {"dtype": "bfloat16", "head_size": 64, "length": 2048} | fields
    chosen = choose("auto", **fields)
    assert chosen.kind == kind
    assert reason in chosen.reason
    if kind == "splash" or "placed" in fields:
        assert choose("splash", **fields).kind == "splash"
    else:
        with pytest.raises(ConfigError, match=r"model\.attention is splash, but .*; use auto or"):
            choose("splash", **fields)


def test_a_run_says_which_attention_it_takes(monkeypatch):
    line = "attention                xla of tokens: cpu is not an NVIDIA GPU"
    assert line in parameter_table(Config(), {})
    monkeypatch.setattr(attention, "_device_kind", lambda: "TPU v6 lite")
    assert "attention             splash of tokens: TPU v6 lite" in parameter_table(Config(), {})
