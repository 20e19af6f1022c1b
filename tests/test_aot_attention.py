# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Splash attention compiled for TPUs that are not here: calls of its kernels, memory, no T x T."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from aot import compile_for, tpu
from pythons import NIGHTLY
from test_configs import load

from jtok_jax.config import Config, MeshConfig, TrainConfig
from jtok_jax.model.splash import splash
from jtok_jax.model_config import ModelConfig
from jtok_jax.planning.advice import changed
from jtok_jax.planning.compiled import Compiled, compile_step, lacks
from jtok_jax.planning.topology import parse_topology

LENGTH = 2048
SQUARE = re.compile(rf"\[[\d,]*\b{LENGTH},{LENGTH}\b[\d,]*\]")
CALL = re.compile(r"%splash_mha_(\w+?)[.\d]* = .*custom-call")

pytestmark = pytest.mark.skipif(bool(lacks("tpu")), reason=f"{lacks('tpu')} (make test-latest)")


def compiled(target: str, attention: str, remat: str, mesh: MeshConfig) -> Compiled:
    """A step of two layers; no other size is a multiple of `LENGTH`."""
    model = ModelConfig(
        vocab_size=512, model_dim=512, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=128,
        ffn_dim=640, loss_chunk=384, attention=attention, remat=remat,
    )  # fmt: skip
    train = TrainConfig(batch_size=4, seq_len=LENGTH)
    return compile_step(Config(model=model, mesh=mesh, train=train), parse_topology(target))


@pytest.mark.parametrize(("target", "remat", "mesh"), [
    ("v5e:2x2", "dots", MeshConfig(fsdp=2, tensor=2)),
    ("v5p:1x1x1", "full", MeshConfig()),
    ("v6e:1x1", "none", MeshConfig()),
])  # fmt: skip
def test_a_step_runs_each_kernel_once_a_layer(target, remat, mesh):
    """`auto` is splash; the layers are loops, so that a call in the text is one a layer."""
    text = compiled(target, "auto", remat, mesh).text
    calls = sorted(CALL.findall(text))
    forward = 1 + (remat == "full")  # which keeps nothing that the kernels return
    assert calls == ["dkv_no_residuals", "dq_no_residuals"] + ["fwd_residuals"] * forward
    assert text.count('custom_call_target="tpu_custom_call"') == len(calls)
    assert not SQUARE.findall(text)


def test_attention_of_xla_has_the_square():
    """So that the test above could fail."""
    text = compiled("v6e:1x1", "xla", "none", MeshConfig()).text
    assert SQUARE.findall(text)
    assert not CALL.findall(text)


@pytest.mark.parametrize(("target", "dtype", "head_size"), [
    ("v5e:2x2", "bfloat16", 64), ("v5p:2x2x1", "float32", 256),
])  # fmt: skip
def test_segments_compile_at_the_smallest_and_the_largest_head(target, dtype, head_size):
    array = lambda heads: jax.ShapeDtypeStruct((2, LENGTH, heads, head_size), dtype)
    segments = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)

    def loss(query, key, value, segment_ids_BT):
        mixed = splash(query, key, value, segment_ids_BT=segment_ids_BT)
        return jnp.sum(jnp.square(mixed.astype(jnp.float32)))

    program = compile_for(
        tpu(target), jax.grad(loss, (0, 1, 2)), array(4), array(2), array(2), segments
    )
    text = program.as_text()
    assert len(re.findall(r"%splash_mha_\w*segmented\w*[.\d]* = .*custom-call", text)) == 3
    assert not SQUARE.findall(text)


@pytest.mark.skipif(not NIGHTLY, reason="minutes; NIGHTLY=1")
@pytest.mark.parametrize(("attention", "least", "most"), [("auto", 17, 18.75), ("xla", 19, 21)])
def test_the_large_model_takes_less_memory(attention, least, most):
    """GiB of dense_l without tables, of which the same step of MaxText takes 18.75."""
    fields = {
        "model.attention": attention, "model.remat": "dots", "mesh.fsdp": 8,
        "train.batch_size": 64, "train.seq_len": LENGTH,
    }  # fmt: skip
    config = changed(load("dense_l:none"), fields)
    total = compile_step(config, parse_topology("v5p:2x2x2")).total / 2**30
    assert least < total <= most
