# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Model, loss and gradients against the float64 loops of oracle.py, in every configuration."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tolerances
from pythons import oldest
from small import (
    DENSE,
    JTOK,
    JTOK_M,
    KINDS,
    MOE,
    gradients,
    numbers_of,
    random_ids,
    random_params,
    with_every_table,
)

from jtok_jax.config import Config, TrainConfig
from jtok_jax.model.params import bind
from jtok_jax.model_config import ModelConfig

replace = dataclasses.replace
VARIANTS = {
    "tied-qk_norm": replace(DENSE, head="tied", qk_norm="rms"),
    "moe-no-renormalize": replace(DENSE, moe=replace(MOE, renormalize=False, shared_dim=0)),
    "jtok-l2-odd": replace(DENSE, jtok=replace(JTOK, norm="l2", layers="odd", eps=0.3)),
    "jtok-shared": replace(DENSE, jtok=replace(JTOK, sharing="shared", gate_scale_init=0.4)),
    "jtok_m-listed": replace(DENSE, jtok=replace(JTOK_M, layers="0,2", norm="l2")),
    "jtok_m-post": replace(
        DENSE, jtok=replace(JTOK_M, router_input="post_attention", router_bias=True)
    ),
    "jtok_m-own-norm": replace(
        DENSE, jtok=replace(JTOK_M, router_norm="own", balance_probability="normalized")
    ),
    "jtok_m-post-weightless-shared": replace(
        DENSE,
        moe=MOE,
        jtok=replace(
            JTOK_M, router_input="post_attention", router_norm="weightless", sharing="shared",
            layers="even",
        ),
    ),
}  # fmt: skip
ALL = KINDS | VARIANTS


def oracle_spec(config: ModelConfig) -> dict:
    jtok = config.jtok
    return {
        "num_layers": config.num_layers,
        "norm_eps": config.norm_eps,
        "rope_base": config.rope_base,
        "qk_norm": config.qk_norm,
        "moe_top_k": config.moe.top_k if config.moe.num_experts else 0,
        "moe_renormalize": config.moe.renormalize,
        "tied": config.head == "tied",
        "jtok_kind": jtok.kind,
        "jtok_norm": jtok.norm,
        "jtok_eps": jtok.eps,
        "jtok_top_k": jtok.top_k,
        "jtok_router_input": jtok.router_input,
        "jtok_router_norm": jtok.router_norm,
        "jtok_balance_probability": jtok.balance_probability,
        "jtok_table_of_layer": list(jtok.table_of_layer(config.num_layers)),
    }


def as_float64(params: dict) -> dict[str, np.ndarray]:
    return {name: np.asarray(value, np.float64) for name, value in params.items()}


@pytest.mark.parametrize("name", ALL)
def test_logits_and_balance_equal_the_oracle(name):
    config = ALL[name]
    params, ids = random_params(config), random_ids(config, 2, 5)
    model = bind(config, params)
    output = jax.jit(lambda model, ids: model(ids))(model, ids)
    expected = oracle.model_batch(as_float64(params), np.asarray(ids), oracle_spec(config))
    close = {**tolerances.FORWARD["float32"], "err_msg": name}
    logits = output.hidden_BTD @ model.head_DV
    np.testing.assert_allclose(logits, expected["logits_BTV"], **close)
    np.testing.assert_allclose(output.moe_balance, expected["moe_balance"], **close)
    np.testing.assert_allclose(output.jtok_balance, expected["jtok_balance"], **close)


@pytest.mark.parametrize(
    ("name", "accumulation"),
    [
        *(pytest.param(name, 1, marks=[oldest] * (name in VARIANTS)) for name in ALL),
        ("dense-jtok", 2),
        ("moe-jtok_m", 2),
    ],
)
def test_gradients_equal_the_oracle(name, accumulation):
    """Directional derivatives: along each parameter of the kinds, along all at once of variants."""
    weights = {"balance_weight": 0.3}
    model = replace(
        ALL[name],
        moe=replace(ALL[name].moe, **weights),
        jtok=replace(ALL[name].jtok, **weights),
    )
    config = Config(
        model=model,
        train=TrainConfig(batch_size=2, seq_len=5, z_loss=0.1, grad_accumulation=accumulation),
    )
    params = random_params(model)
    ids, targets = random_ids(model, 2, 5), random_ids(model, 2, 5, seed=1)
    losses, grads = jax.jit(functools.partial(gradients, config))(params, ids, targets)
    params64, spec = as_float64(params), oracle_spec(model)
    batches = np.split(np.arange(2), accumulation)  # balance losses are those of a microbatch

    def loss(params, **weights):
        parts = [
            oracle.loss(params, np.asarray(ids)[rows], np.asarray(targets)[rows], spec, **weights)
            for rows in batches
        ]
        return np.mean(parts)

    none = {"z_weight": 0.0, "moe_balance_weight": 0.0, "jtok_balance_weight": 0.0}
    all_terms = {"z_weight": 0.1, "moe_balance_weight": 0.3, "jtok_balance_weight": 0.3}
    np.testing.assert_allclose(losses.loss, loss(params64, **none), **tolerances.FORWARD["float32"])
    assert grads.keys() == params.keys()
    rng = np.random.default_rng(3)
    alone = name in KINDS and accumulation == 1
    for names in [[one] for one in params64] if alone else [list(params64)]:
        direction = {one: rng.standard_normal(params64[one].shape) for one in names}
        expected = oracle.directional_derivative(
            lambda p: loss(p, **all_terms), params64, direction, step=1e-5
        )
        got = sum(np.vdot(np.asarray(grads[one], np.float64), direction[one]) for one in names)
        np.testing.assert_allclose(
            got, expected, **tolerances.DERIVATIVE["float32"], err_msg=f"{name} {names}"
        )


@pytest.mark.parametrize(("model", "most"), [
    (KINDS["moe-jtok"], 0.02),
    pytest.param(with_every_table(DENSE), 0.02, marks=oldest),
    # Whose choices among tables differ where two are near.
    (KINDS["dense-jtok_m"], 0.05),
], ids=["moe-jtok", "arms", "dense-jtok_m"])  # fmt: skip
def test_gradients_of_a_bfloat16_model_are_near_those_of_float32(model, most):
    """Of the same parameters, each within `most` of its norm: sums over thousands of tokens of one
    id, which in bfloat16 would stop growing (0.33 of the head), are in float32.
    """
    model = replace(model, init_std=0.1)
    share = 1 / np.arange(1, model.vocab_size + 1)
    rng = np.random.default_rng(0)
    ids, targets = np.int32(rng.choice(len(share), size=(2, 16, 512), p=share / share.sum()))
    moved = lambda x: np.float32(jnp.bfloat16(x + 0.02 * rng.standard_normal(x.shape)))
    params = random_params(model)
    params |= jax.tree.map(moved, numbers_of(params))
    train = TrainConfig(batch_size=16, seq_len=512)

    def found(dtype):
        config = Config(model=replace(model, compute_dtype=dtype), train=train)
        return jax.jit(functools.partial(gradients, config))(params, ids, targets)[1]

    exact, rounded = as_float64(found("float32")), as_float64(found("bfloat16"))
    errors = {
        name: np.linalg.norm(rounded[name] - exact[name]) / np.linalg.norm(exact[name])
        for name in exact
    }
    assert max(errors.values()) < most, errors
    assert min(errors.values()) > 1e-5, errors  # bfloat16 is at work
