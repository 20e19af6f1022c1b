# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Properties of JTok and JTok-M that follow from the equations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerances
from flax import nnx
from jtok_kernels import reference
from small import DENSE, JTOK, JTOK_M, KINDS, MOE, gradients, random_ids, random_params

from jtok_jax import JTok, JTokM
from jtok_jax.config import Config, TrainConfig
from jtok_jax.errors import ConfigError
from jtok_jax.model import routing
from jtok_jax.model.params import bind
from jtok_jax.model_config import ModelConfig

CLOSE = tolerances.FORWARD["float32"]
WITH_TABLES = [name for name in KINDS if "jtok" in name]


def logits(config: ModelConfig, params: dict, ids: jax.Array) -> jax.Array:
    model = bind(config, params)
    return model(ids).hidden_BTD @ model.head_DV


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", WITH_TABLES)
def test_zero_scale_is_the_backbone_exactly(name, compute_dtype):
    config = dataclasses.replace(KINDS[name], compute_dtype=compute_dtype)
    plain = dataclasses.replace(config, jtok=dataclasses.replace(config.jtok, kind="none"))
    params, ids = random_params(config), random_ids(config, 2, 7)
    backbone = {n: v for n, v in params.items() if n != "tables" and "/jtok/" not in n}
    start = params | {"blocks/jtok/scale": jnp.zeros_like(params["blocks/jtok/scale"])}
    np.testing.assert_array_equal(logits(config, start, ids), logits(plain, backbone, ids))
    moved = np.abs(logits(config, params, ids) - logits(plain, backbone, ids)).max()
    assert moved > 1e-3, "the tables do nothing"


@pytest.mark.parametrize("name", WITH_TABLES)
def test_scaling_a_row_changes_nothing(name):
    """Norm_eps removes the size of a row (for JTok-M: of all rows of a token together)."""
    config = KINDS[name]
    params, ids = random_params(config), random_ids(config, 2, 7)
    scaled = params | {"tables": params["tables"].at[..., ids[0, 3], :].multiply(7.0)}
    np.testing.assert_allclose(
        logits(config, params, ids), logits(config, scaled, ids), rtol=1e-4, atol=1e-4
    )
    turned = params | {"tables": params["tables"].at[..., ids[0, 3], :].multiply(-1.0)}
    assert np.abs(logits(config, params, ids) - logits(config, turned, ids)).max() > 1e-3


@pytest.mark.parametrize("name", KINDS)
def test_no_gradient_flows_to_later_tokens(name):
    """Causality: the output at a place does not depend on the embedding of a later token."""
    config = KINDS[name]
    params, place = random_params(config), 4
    ids = jnp.arange(9)[None]  # all different, so an embedding row stands for one place

    def output(embed, at):
        return jnp.sum(jnp.square(logits(config, params | {"embed": embed}, ids)[0, at]))

    grads = jax.grad(output)(params["embed"], place)
    assert np.all(np.asarray(grads[place + 1 : 9]) == 0)
    assert np.all(np.any(np.asarray(grads[: place + 1]) != 0, axis=-1))


def test_equations_equal_the_oracle():
    rng = np.random.default_rng(0)
    dm, row, scale = rng.standard_normal((3, 13))
    for norm, eps in (("l2", 1e-6), ("rms", 0.5)):
        gated = dm * reference.gate(row, scale, norm=norm, eps=eps)
        expected = oracle.jtok_gate(dm, row, scale, norm=norm, eps=eps)
        np.testing.assert_allclose(gated, expected, **CLOSE)
    x, router, bias = rng.standard_normal(13), rng.standard_normal((13, 5)), rng.standard_normal(5)
    routed = routing.route(*map(jnp.float32, (x[None, None], router, bias)), top_k=3)
    choice, weights, sigmoid = oracle.jtok_m_route(x, router, bias, 3)
    np.testing.assert_array_equal(routed.choice[0, 0], choice)
    np.testing.assert_allclose(routed.weights[0, 0], weights, **CLOSE)
    np.testing.assert_allclose(routed.probabilities[0, 0], sigmoid, **CLOSE)
    rows = rng.standard_normal((5, 13))
    e = reference.mix(jnp.float32(rows[choice][None, None]), routed.weights)
    delta = reference.injection(e, scale, depth_scale=22**-0.5, norm="l2", eps=1e-3)[0, 0]
    form = {"num_layers": 11, "norm": "l2", "eps": 1e-3}
    expected = oracle.jtok_m_delta(rows, choice, weights, scale, **form)
    np.testing.assert_allclose(delta, expected, **CLOSE)


def test_rms_is_l2_with_scale_times_root_of_width():
    row, scale = np.random.default_rng(0).standard_normal((2, 17))
    rms = reference.gate(row, scale, norm="rms", eps=0.0)
    np.testing.assert_allclose(
        rms, reference.gate(row, scale * 17**0.5, norm="l2", eps=0.0), **CLOSE
    )


def test_zero_rows_have_finite_values_and_gradients():
    def total(e):
        return jnp.sum(reference.norm_eps(e, norm="l2", eps=1e-6))

    value, grads = jax.value_and_grad(total)(jnp.zeros((3, 13)))
    assert value == 0
    assert np.all(np.isfinite(grads))


def test_weights_sum_to_one_for_any_logits():
    """Sigmoids of very negative logits underflow; their ratio must not."""
    x = jnp.full((1, 1, 1), 1.0)
    routed = routing.route(x, jnp.array([[-200.0, -201.0, -300.0]]), None, top_k=2)
    np.testing.assert_allclose(routed.weights[0, 0], jax.nn.softmax(jnp.array([1.0, 0.0])), **CLOSE)


def test_unvisited_rows_receive_no_gradient_and_shared_tables_add_up():
    for settings in (JTOK, dataclasses.replace(JTOK_M, sharing="shared", top_k=5)):
        model = dataclasses.replace(DENSE, moe=MOE, jtok=settings)
        ids = random_ids(model, 2, 7)
        config = Config(model=model, train=TrainConfig(batch_size=2, seq_len=7))
        _, grads = jax.jit(functools.partial(gradients, config))(random_params(model), ids, ids)
        visited = np.isin(np.arange(model.vocab_size), ids)
        norms = np.square(np.moveaxis(grads["tables"], -2, 0)).reshape(model.vocab_size, -1).sum(-1)
        assert np.all(norms[~visited] == 0)
        assert np.all(norms[visited] > 0)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_largest_logits_are_those_of_top_k(count):
    """With ties, infinities and NaN: every place is another one."""
    rng = np.random.default_rng(0)
    values = rng.integers(-2, 3, (200, 5)).astype(np.float32)
    values[rng.random(values.shape) < 0.1] = -np.inf
    values[rng.random(values.shape) < 0.1] = np.nan
    found, places = routing.largest(jnp.asarray(values), count)
    wanted, wanted_places = jax.lax.top_k(jnp.asarray(values), count)
    np.testing.assert_array_equal(places, wanted_places)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("make", "message"), [
    (lambda **k: JTokM(8, 4, num_layers=0, **k), "num_layers is 0"),
    (lambda **k: JTokM(8, 4, num_layers=1, top_k=3, num_tables=2, **k), "top_k 3 of 2 tables"),
    (lambda **k: JTok(8, 4, norm="layer", **k), "norm is 'layer'; expected one of l2, rms"),
    (lambda **k: JTok(8, 4, table_dtype="float16", **k), "table_dtype is 'float16'"),
    (lambda **k: JTok(-8, 4, **k), "A table of -8 rows of 4 is none"),
])  # fmt: skip
def test_arguments_that_cannot_be_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make(rngs=nnx.Rngs(0))


def test_ids_of_another_shape_are_refused():
    h = jnp.zeros((2, 8, 4))
    with pytest.raises(ConfigError, match=r"ids have the shape \(2, 7\) and h \(2, 8, 4\); expect"):
        JTok(8, 4, rngs=nnx.Rngs(0))(h, h, jnp.zeros((2, 7), jnp.int32))
