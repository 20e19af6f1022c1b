# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""What JTok is compared with: each arm against its formula in numpy, in the decoder and alone."""

import dataclasses
import tomllib

import jax
import numpy as np
import pytest
from conftest import ROOT
from pythons import oldest
from small import DENSE, JTOK_M, gradients, random_ids, small_config, training

from jtok_jax import flops
from jtok_jax.arms import ArmsConfig, Parameter, Seen, Sizes
from jtok_jax.arms.hashing import bigram_rows
from jtok_jax.config import Config, OptimizerConfig, TableOptimizerConfig
from jtok_jax.errors import ConfigError
from jtok_jax.inference.generator import generate
from jtok_jax.inference.sampling import Sampling
from jtok_jax.model.params import bind, init_params
from jtok_jax.model_config import ModelConfig

pytestmark = oldest
NAMES = [field.name for field in dataclasses.fields(ArmsConfig)][1:]
SAME_AT_FIRST = ("adapter", "bigram", "deep_embed", "film", "mixture")
# With a formula below, and one that is no increment.
OTHERS = ("bigram", "mixture", "value_embedding")
BY_ID = ("bigram", "bigram_gate", "deep_embed", "low_rank", "token_gate", "value_embedding")
SIZES = Sizes(vocab=30, dim=12, kv_heads=2, head_dim=6)
IDS = np.random.default_rng(0).integers(0, 30, (3, 5))


# Without decay, so that what moves has a gradient.
ADAMW = OptimizerConfig(weight_decay=0.0, tables=TableOptimizerConfig(kind="adamw"))


def model_with(names: str) -> ModelConfig:
    return dataclasses.replace(DENSE, arms=ArmsConfig(names=names))


def run_with(model: ModelConfig) -> Config:
    return dataclasses.replace(small_config(model), optimizer=ADAMW)


def drawn(arm, method: str, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    parameters = getattr(arm, method)(SIZES)
    return {name: np.float32(rng.standard_normal(p.shape)) for name, p in parameters.items()}


def normal(*shape: int) -> np.ndarray:
    return np.float32(np.random.default_rng(2).standard_normal(shape))


def rms(e: np.ndarray) -> np.ndarray:
    return e / (np.sqrt(np.mean(e**2, axis=-1, keepdims=True)) + 1e-6)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


INCREMENTS = {
    "adapter": lambda p, dm, x: dm + gelu(x @ p["down"]) @ p["up"],
    "deep_embed": lambda p, dm, x: dm * (1 + p["table"][IDS]),
    "film": lambda p, dm, x: dm * (1 + x @ p["down"] @ p["gain"]) + x @ p["down"] @ p["shift"],
    "low_rank": lambda p, dm, x: dm * (1 + p["scale"] * rms(p["table"][IDS] @ p["out"])),
    "token_gate": lambda p, dm, x: dm * (1 + p["scale"] * rms(p["table"][IDS])),
    "bigram_gate": lambda p, dm, x: (
        dm * (1 + p["scale"] * rms(p["table"][np.asarray(bigram_rows(IDS, 30))]))
    ),
}


def test_every_arm_has_a_formula_here_and_knows_none_of_the_others():
    assert {*INCREMENTS, *OTHERS} == set(NAMES), "add the new arm to INCREMENTS, or a test"
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (apart,) = (one for one in contracts["contracts"] if one["name"].startswith("An arm "))
    assert apart["modules"] == [f"jtok_jax.arms.{name}" for name in NAMES], "pyproject.toml"


@pytest.mark.parametrize("name", INCREMENTS)
def test_increments_are_those_of_their_formulas(name):
    arm = getattr(ArmsConfig(), name)
    params, dm, x = drawn(arm, "layer_parameters"), normal(3, 5, 12), 0.5 * normal(3, 5, 12)
    found = arm.increment(params, dm, Seen(IDS, None, x, None))
    np.testing.assert_allclose(found, INCREMENTS[name](params, dm, x), rtol=2e-5, atol=2e-5)


def test_values_and_embeddings_are_added():
    arms = ArmsConfig()
    params, value = drawn(arms.value_embedding, "layer_parameters"), normal(3, 5, 2, 6)
    found = arms.value_embedding.values(params, value, IDS)
    np.testing.assert_array_equal(found, value + params["table"][IDS])
    params, h = drawn(arms.bigram, "parameters"), normal(3, 5, 12)
    rows = np.asarray(bigram_rows(IDS, len(params["table"])))
    np.testing.assert_array_equal(arms.bigram.embed(params, h, IDS), h + params["table"][rows])


def test_bigrams_are_spread_and_depend_on_two_ids_in_order():
    first, second = np.divmod(np.arange(200 * 200), 200)
    rows = np.asarray(bigram_rows(np.stack([first, second], axis=1), 1000))[:, 1]
    counts = np.bincount(rows, minlength=1000)  # of 40,000: 40 each, standard deviation 6.3
    assert counts.min() > 10
    assert counts.max() < 80
    swapped = rows.reshape(200, 200).T.reshape(-1)
    assert np.mean(rows == swapped) < 0.01
    alone = np.asarray(bigram_rows(np.arange(200)[:, None], 1000))[:, 0]
    assert len(set(alone)) > 150  # a first id has rows too


@pytest.mark.parametrize("name", NAMES)
def test_an_arm_adds_to_the_backbone_and_changes_none_of_it(name):
    dense, model = init_params(DENSE, jax.random.key(3)), model_with(name)
    params = init_params(model, jax.random.key(3))
    assert {n: leaf.shape for n, leaf in params.items()} == flops.parameter_shapes(model)
    for key, value in dense.items():
        np.testing.assert_array_equal(params[key], value, err_msg=key)
    ids = random_ids(DENSE, 2, 9)
    hidden = bind(model, params)(ids).hidden_BTD
    same = np.array_equal(hidden, bind(DENSE, dense)(ids).hidden_BTD)
    assert same == (name in SAME_AT_FIRST), f"SAME_AT_FIRST is wrong about {name}"


def test_a_mixture_is_jtok_m():
    """At the paper's depth scale, without balance loss: hidden states and gradients."""
    layers = DENSE.num_layers
    mixture = dataclasses.replace(
        ArmsConfig().mixture, depth_scale=(2 * layers) ** -0.5, num_tables=JTOK_M.num_tables,
        top_k=JTOK_M.top_k, norm=JTOK_M.norm, eps=JTOK_M.eps,
    )  # fmt: skip
    ours = run_with(dataclasses.replace(DENSE, arms=ArmsConfig(names="mixture", mixture=mixture)))
    jtok = dataclasses.replace(JTOK_M, balance_weight=0.0)
    theirs = run_with(dataclasses.replace(DENSE, jtok=jtok))
    params = init_params(theirs.model, jax.random.key(0))
    renamed = {"tables": "table", "blocks/jtok/scale": "scale", "blocks/jtok/router": "router"}
    names = {name: f"blocks/arms/mixture/{renamed[name]}" for name in renamed}
    same = {names.get(name, name): value for name, value in params.items()}
    ids = random_ids(DENSE, 4, 16)
    expected = gradients(theirs, params, ids, (ids + 1) % 30)
    found = gradients(ours, same, ids, (ids + 1) % 30)
    np.testing.assert_allclose(found[0].loss, expected[0].loss, rtol=1e-6)
    for name, value in expected[1].items():
        np.testing.assert_allclose(
            found[1][names.get(name, name)], value, rtol=1e-4, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("changes", [
    {"router": "before"}, {"router": "token"}, {"router": "random"}, {"weights": "softmax"},
    {"norm": "none"},
], ids=str)  # fmt: skip
def test_ablations_of_a_mixture_are_those_of_their_formulas(changes):
    arm = dataclasses.replace(ArmsConfig().mixture, depth_scale=0.3, **changes)
    params, dm, x = drawn(arm, "layer_parameters"), normal(3, 5, 12), normal(3, 5, 12)[::-1]
    logits = params["router_by_token"][IDS] if arm.router == "token" else None
    if arm.router in ("hidden", "before"):
        logits = x @ params["router"]
    if arm.router == "random":
        assert "router" not in params
        logits = np.asarray(arm._logits(params, Seen(IDS, None, None, None)))
        assert np.ptp(logits) > 0.5
        assert len(np.unique(logits.reshape(-1, 5), axis=0)) == len(np.unique(IDS))  # by id alone
    choice = np.argsort(-logits, axis=-1)[..., : arm.top_k]
    chosen = np.take_along_axis(logits, choice, axis=-1)
    size = np.exp(chosen) if arm.weights == "softmax" else 1 / (1 + np.exp(-chosen))
    weights = size / size.sum(axis=-1, keepdims=True)
    e = np.sum(weights[..., None] * params["table"][choice, IDS[..., None]], axis=-2)
    e = e if arm.norm == "none" else rms(e)
    streams = (-x, None, x) if arm.router == "before" else (x, None, -x)
    found = arm.increment(params, dm, Seen(IDS, *streams))
    np.testing.assert_allclose(found, dm + 0.3 * params["scale"] * e, rtol=1e-4, atol=1e-5)


def test_a_router_can_read_the_stream_of_the_layer_before():
    """The first layer reads its own, the second what entered the first."""
    models = [
        dataclasses.replace(DENSE, num_layers=2, arms=ArmsConfig(names="mixture", mixture=mixture))
        for mixture in (dataclasses.replace(ArmsConfig().mixture, router=r, router_init_std=1.0)
                        for r in ("hidden", "before"))
    ]  # fmt: skip
    params, ids = init_params(models[0], jax.random.key(0)), random_ids(DENSE, 2, 9)

    def same(changes: dict) -> bool:
        hidden = [bind(model, params | changes)(ids).hidden_BTD for model in models]
        return np.array_equal(*hidden)

    scale = "blocks/arms/mixture/scale"
    first, second = (np.float32([[a], [b]]) + 0 * params[scale] for a, b in ((1, 0), (0, 1)))
    assert same({scale: first})
    assert not same({scale: second})
    idle = {n: 0 * params[n] for n in ("blocks/attention/out", "blocks/ffn/down")}
    assert same({scale: second} | idle)


@pytest.mark.parametrize("name", NAMES)
def test_no_token_sees_a_later_one(name):
    model = model_with(name)
    params = init_params(model, jax.random.key(0))
    rng = np.random.default_rng(0)  # what starts at zero must count
    params = {n: x + 0.3 * np.float32(rng.standard_normal(x.shape)) for n, x in params.items()}
    ids = np.array(random_ids(DENSE, 1, 9))
    before = bind(model, params)(ids).hidden_BTD
    ids[0, 5] = (ids[0, 5] + 1) % DENSE.vocab_size
    after = bind(model, params)(ids).hidden_BTD
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert not np.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_an_arm_learns(name):
    config = run_with(model_with(name))
    state, step, _ = training(config)
    ids = random_ids(DENSE, 4, 16)
    first = state.params
    for _ in range(2):  # what is behind zeros gets no gradient in the first
        state, _ = step(state, ids, (ids + 1) % DENSE.vocab_size)
    for key in flops.arm_parameters(config.model):
        assert not np.array_equal(first[key], state.params[key]), key


def test_tables_of_arms_have_the_options_of_token_tables():
    """Rate 0 keeps them as they are, and them alone."""
    config = run_with(model_with("token_gate"))
    tables = dataclasses.replace(config.optimizer.tables, learning_rate_multiplier=0.0)
    optimizer = dataclasses.replace(config.optimizer, tables=tables)
    state, step, _ = training(dataclasses.replace(config, optimizer=optimizer))
    ids = random_ids(DENSE, 4, 16)
    after, _ = step(state, ids, ids)
    same = {n for n, value in state.params.items() if np.array_equal(value, after.params[n])}
    assert same == {"blocks/arms/token_gate/table"}


def test_arms_go_together_and_with_token_tables():
    model = dataclasses.replace(model_with("bigram,token_gate"), jtok=JTOK_M)
    state, step, _ = training(run_with(model))
    ids = random_ids(DENSE, 4, 16)
    after, metrics = step(state, ids, ids)
    assert np.isfinite(metrics.loss)
    counts = flops.count(model, seq_len=16)
    assert counts.total == sum(leaf.size for leaf in after.params.values())
    assert counts.tables == sum(
        leaf.size for name, leaf in after.params.items() if name.endswith(("table", "tables"))
    )


def test_an_axis_of_two_sizes_is_refused(monkeypatch):
    gate = ArmsConfig().bigram_gate
    clash = {"table": Parameter("bD", (999, DENSE.model_dim))}
    monkeypatch.setattr(type(gate), "layer_parameters", lambda *_: clash)
    with pytest.raises(ValueError, match="Axis 'b' of blocks/arms/bigram_gate/table is 999"):
        flops.parameter_shapes(model_with("bigram,bigram_gate"))


def test_logits_by_token_are_looked_up():
    def counts(router):
        arm = dataclasses.replace(ArmsConfig().mixture, router=router)
        arms = ArmsConfig(names="mixture", mixture=arm)
        return flops.count(dataclasses.replace(DENSE, arms=arms), seq_len=16), arm

    (token, arm), (fixed, _) = counts("token"), counts("random")
    assert (token.forward_flops, token.backbone) == (fixed.forward_flops, fixed.backbone)
    logits = DENSE.num_layers * DENSE.padded_vocab * arm.num_tables
    assert token.tables - fixed.tables == logits


def test_flops_are_those_of_the_matrices():
    count = lambda names: flops.count(model_with(names), seq_len=16).forward_flops
    film, adapter = ArmsConfig().film, ArmsConfig().adapter
    layers, dim = DENSE.num_layers, DENSE.model_dim
    assert count("film") - count("") == 2 * layers * 3 * dim * film.rank
    assert count("adapter") - count("") == 2 * layers * 2 * dim * adapter.width
    router = 2 * layers * dim * ArmsConfig().mixture.num_tables
    assert count("mixture") - count("") == router
    for name in set(BY_ID) - {"low_rank"}:
        assert count(name) == count("")


def test_tables_of_arms_refuse_optimizers_they_do_not_have():
    with pytest.raises(ConfigError, match=r"kind is 'lazy_adam', but tables of arms \(bigram\)"):
        training(small_config(model_with("bigram")))


@pytest.mark.parametrize("names", ["jtok", "bigram, film", "film,film", ","])
def test_names_that_are_no_arms_are_refused(names):
    with pytest.raises(ConfigError, match=r"model.arms.names .* each once"):
        ArmsConfig(names=names)


@pytest.mark.parametrize(("name", "options", "message"), [
    ("film", {"rank": 0}, "model.arms.film.rank is 0; expected at least 1"),
    ("low_rank", {"norm": "max"}, "model.arms.low_rank.norm is 'max'; expected one of l2, rms"),
    ("mixture", {"top_k": 6}, r"top_k \(K\) is 6; num_tables \(n_e\) is 5"),
    ("mixture", {"router": "none"}, "expected one of hidden, before, token, random"),
    ("token_gate", {"init_std": -1.0}, "model.arms.token_gate.init_std is -1.0"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(getattr(ArmsConfig(), name), **options)


def test_generation_is_refused():
    model = model_with("bigram")
    with pytest.raises(ConfigError, match="arms"):
        generate(model, {}, [[1]], tokens=1, sampling=Sampling(), seed=0)
