# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Splash attention compiled for TPUs that are not here: calls of its kernels, memory, no T x T."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from aot import compile_for, tpu
from jax.sharding import Mesh
from pythons import NIGHTLY
from test_configs import load

from jtok_jax.config import Config, MeshConfig
from jtok_jax.mesh import AUTO, AXES, split_batch
from jtok_jax.model.attention import causal
from jtok_jax.model.params import bind, init_params
from jtok_jax.model.placement import parameter_sharding
from jtok_jax.model.transformer import Parallel
from jtok_jax.model_config import ModelConfig
from jtok_jax.planning.advice import changed
from jtok_jax.planning.compiled import absent_devices, compile_step, lacks
from jtok_jax.planning.topology import parse_topology

LENGTH = 2048
SQUARE = re.compile(rf"\[[\d,]*\b{LENGTH},{LENGTH}\b[\d,]*\]")
CALL = re.compile(r"%splash_mha_(\w+?)[.\d]* = .*custom-call")

pytestmark = pytest.mark.skipif(bool(lacks("tpu")), reason=f"{lacks('tpu')} (make test-latest)")


def gradients_of_layers(name: str, shape: tuple[int, ...], attention: str, remat: str) -> str:
    """The compiled forward and backward pass of two layers; no other size is near `LENGTH`."""
    model = ModelConfig(
        vocab_size=512, model_dim=512, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=128,
        ffn_dim=640, attention=attention, remat=remat,
    )  # fmt: skip
    devices = absent_devices(name, 4)
    mesh = Mesh(devices[: math.prod(shape)].reshape(shape), AXES, axis_types=AUTO)
    place = parameter_sharding(Config(model=model, mesh=MeshConfig(*shape)), mesh)
    params = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    params = {n: x.update(sharding=place(n, x.shape)) for n, x in params.items()}
    ids = jax.ShapeDtypeStruct((4, LENGTH), jnp.int32, sharding=split_batch(mesh))
    parallel = Parallel({}, mesh) if mesh.size > 1 else None
    embed = {"embed": params.pop("embed")}  # its gradient is a sort, which takes long to compile

    def loss(params, embed, ids_BT):
        hidden_BTD = bind(model, params | embed)(ids_BT, parallel=parallel).hidden_BTD
        return jnp.sum(jnp.square(hidden_BTD))

    return compile_for(mesh, jax.grad(loss), params, embed, ids).as_text()


nightly = pytest.mark.skipif(not NIGHTLY, reason="half a minute or more; NIGHTLY=1")


@pytest.mark.parametrize(("name", "shape", "remat"), [
    ("v5e:2x2", (1, 2, 1, 2), "dots"),
    pytest.param("v5p:2x2x1", (1, 1, 1, 1), "full", marks=nightly),
    pytest.param("v6e:2x2", (2, 2, 1, 1), "none", marks=nightly),
])  # fmt: skip
def test_each_kernel_runs_once_a_layer(name, shape, remat):
    """`auto` is splash; the layers are loops, so that a call in the text is one a layer."""
    text = gradients_of_layers(name, shape, "auto", remat)
    calls = sorted(CALL.findall(text))
    forward = 1 + (remat == "full")  # which keeps nothing that the kernels return
    assert calls == ["dkv_no_residuals", "dq_no_residuals"] + ["fwd_residuals"] * forward
    assert text.count('custom_call_target="tpu_custom_call"') == len(calls)
    assert not SQUARE.findall(text)


@pytest.mark.parametrize(("target", "dtype", "head_size", "kind"), [
    ("v5e:2x2", "bfloat16", 64, "auto"), ("v5p:2x2x1", "float32", 256, "auto"),
    ("v6e:2x2", "bfloat16", 128, "auto"), ("v6e:2x2", "bfloat16", 128, "xla"),
])  # fmt: skip
def test_segments_compile_from_the_smallest_to_the_largest_head(target, dtype, head_size, kind):
    """Kind "xla" has the square: so these tests could fail."""
    array = lambda heads: jax.ShapeDtypeStruct((2, LENGTH, heads, head_size), dtype)
    segments = jax.ShapeDtypeStruct((2, LENGTH), jnp.int32)

    def loss(query, key, value, segment_ids_BT):
        mixed = causal(query, key, value, kind=kind, segment_ids_BT=segment_ids_BT)
        return jnp.sum(jnp.square(mixed.astype(jnp.float32)))

    arrays = array(4), array(2), array(2), segments
    function = loss if kind == "xla" else jax.grad(loss, (0, 1, 2))
    text = compile_for(tpu(target), function, *arrays).as_text()
    calls = re.findall(r"%splash_mha_\w*segmented\w*[.\d]* = .*custom-call", text)
    assert len(calls) == (3 if kind == "auto" else 0)
    assert bool(SQUARE.search(text)) == (kind == "xla")


@nightly
@pytest.mark.parametrize(("attention", "least", "most"), [("auto", 17, 18.75), ("xla", 19, 21)])
def test_the_large_model_takes_less_memory(attention, least, most):
    """GiB of dense_l without tables, of which the same step of MaxText takes 18.75."""
    fields = {
        "model.attention": attention, "model.remat": "dots", "mesh.fsdp": 8,
        "train.batch_size": 64, "train.seq_len": LENGTH,
    }  # fmt: skip
    config = changed(load("dense_l", "none"), fields)
    total = compile_step(config, parse_topology("v5p:2x2x2")).total / 2**30
    assert least < total <= most
