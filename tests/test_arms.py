# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Layers beside JTok, and their tables: formulas in numpy, row-sparse gradients, streams."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pythons import oldest
from small import (
    ARMS,
    DENSE,
    JTOK,
    JTOK_M,
    gradients,
    numbers_of,
    one_device,
    random_ids,
    small_config,
    training,
    with_every_table,
    with_ngrams,
)

from jtok_jax import flops
from jtok_jax.arms_config import (
    ArmsConfig,
    DeepEmbedConfig,
    LowRankConfig,
    NgramConfig,
    SconeConfig,
    ValueEmbeddingConfig,
)
from jtok_jax.config import Config, OptimizerConfig, TableOptimizerConfig
from jtok_jax.errors import ConfigError
from jtok_jax.model.arms import LAYERS
from jtok_jax.model.attention import AttentionResult, causal
from jtok_jax.model.ngram_index import indices_of
from jtok_jax.model.params import bind, declared, declared_tables, init_params
from jtok_jax.model.tables import stream_ids
from jtok_jax.model_config import ModelConfig
from jtok_jax.streams import IdStream, parse_streams
from jtok_jax.training.optimizer import make_optimizer
from jtok_jax.training.state import abstract_state
from jtok_jax.training.step import jit_train_step

pytestmark = oldest
SAME_AT_FIRST = ("adapter", "deep_embed", "film", "ngram")
STREAMS = "bigram=2:37, trigram=3:41:2"
IDS = np.random.default_rng(0).integers(0, 29, (3, 5))
EVERYTHING = with_every_table(
    dataclasses.replace(DENSE, jtok=dataclasses.replace(JTOK_M, num_tables=3))
)


def model_with(name: str, base: ModelConfig = DENSE) -> ModelConfig:
    """One arm; n-grams of two orders, one of them under two hash functions."""
    streams = {"ngram": STREAMS, "scone": "frequent=3:90:frequent"}.get(name, "")
    arms = ArmsConfig(names=name, ngram=NgramConfig("bigram,trigram"))
    return dataclasses.replace(base, arms=arms, streams=streams)


def run_with(model: ModelConfig, kind: str = "lazy_adam", **train) -> Config:
    """No decay, so that what moves has a gradient."""
    optimizer = OptimizerConfig(weight_decay=0.0, tables=TableOptimizerConfig(kind=kind))
    return dataclasses.replace(small_config(model, **train), optimizer=optimizer)


def moved(params: dict, size: float = 0.3) -> dict:
    """Return parameters with noise added, so that what starts at zero counts."""
    rng = np.random.default_rng(0)
    noise = lambda value: size * np.float32(rng.standard_normal(value.shape))
    return {
        name: value if value.dtype == jnp.int32 else value + noise(value)
        for name, value in params.items()
    }


def normal(*shape: int, seed: int = 2) -> np.ndarray:
    return np.float32(np.random.default_rng(seed).standard_normal(shape))


def rms(e: np.ndarray) -> np.ndarray:
    return e / (np.sqrt(np.mean(e**2, axis=-1, keepdims=True)) + 1e-6)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


INCREMENTS = {
    "adapter": lambda p, dm, x, e: dm + gelu(x @ p["down"]) @ p["up"],
    "deep_embed": lambda p, dm, x, e: dm * (1 + e),
    "film": lambda p, dm, x, e: dm * (1 + x @ p["down"] @ p["gain"]) + x @ p["down"] @ p["shift"],
    "low_rank": lambda p, dm, x, e: dm * (1 + p["scale"] * rms(e[..., :16] @ p["out"])),
}


@pytest.mark.parametrize("name", INCREMENTS)
def test_increments_are_those_of_their_formulas(name):
    arm = LAYERS[name](dataclasses.replace(DENSE, model_dim=12), rngs=nnx.Rngs(0))
    params = {key: normal(*value.shape, seed=3) for key, value in nnx.to_pure_dict(
        nnx.state(arm)).items()}  # fmt: skip
    nnx.update(arm, jax.tree.map(jnp.asarray, params))
    dm, x = normal(3, 5, 12), 0.5 * normal(3, 5, 12, seed=4)
    rows = normal(3, 5, 16 if name == "low_rank" else 12, seed=5)
    found = arm.increment(dm, x, rows)
    np.testing.assert_allclose(found, INCREMENTS[name](params, dm, x, rows), rtol=2e-5, atol=2e-5)


def numpy_ids(stream: IdStream, ids: np.ndarray) -> np.ndarray:
    """The hash written again, with integers of Python."""

    def mixed(word):  # the finalizer of MurmurHash3
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            word = ((word ^ (word >> shift)) * factor) & 0xFFFFFFFF
        return word ^ (word >> 16)

    def row(tokens, head):
        word = 0
        for token in tokens:
            word = mixed(token ^ word)
        if stream.heads == 1:
            return word % stream.rows
        return mixed(word ^ (head * 0x9E3779B9 & 0xFFFFFFFF)) % stream.rows + head * stream.rows

    padded = np.pad(ids + 1, ((0, 0), (stream.order - 1, 0)))
    grams = np.lib.stride_tricks.sliding_window_view(padded, stream.order, axis=1)
    found = [[[row(map(int, gram), head) for head in range(stream.heads)] for gram in one]
             for one in grams]  # fmt: skip
    return np.array(found)[..., 0] if stream.heads == 1 else np.array(found)


@pytest.mark.parametrize("name", ["bigram", "trigram"])
def test_streams_are_those_of_their_hashes_and_go_on_after_a_cut(name):
    stream = parse_streams(STREAMS, 29)[name]
    whole = stream_ids(stream, jnp.asarray(IDS, jnp.int32))
    np.testing.assert_array_equal(whole, numpy_ids(stream, IDS))
    before = jnp.asarray(np.pad(IDS[:, :1] + 1, ((0, 0), (1, 0))), jnp.int32)
    rest = stream_ids(stream, jnp.asarray(IDS[:, 1:], jnp.int32), before)
    np.testing.assert_array_equal(rest, whole[:, 1:])


def test_bigrams_are_spread_and_depend_on_two_ids_in_order():
    first, second = np.divmod(np.arange(200 * 200), 200)
    pairs = jnp.asarray(np.stack([first, second], axis=1), jnp.int32)
    rows = np.asarray(stream_ids(IdStream("bigram", 2, 1000), pairs))[:, 1]
    counts = np.bincount(rows, minlength=1000)  # of 40,000: 40 each, standard deviation 6.3
    assert counts.min() > 10
    assert counts.max() < 80
    swapped = rows.reshape(200, 200).T.reshape(-1)
    assert np.mean(rows == swapped) < 0.01


@pytest.mark.parametrize("name", ["ngram", "value_embedding"])
def test_rows_are_added_at_the_input_and_to_values(name):
    """The model against the dense one whose embedding, or values, have the rows already."""
    model = dataclasses.replace(model_with(name), num_layers=1)
    params = moved(init_params(model, jax.random.key(0)))
    dense = {key: value for key, value in params.items() if "arms" not in key}
    plain = bind(dataclasses.replace(DENSE, num_layers=1), dense)
    if name == "ngram":
        streams, added = model.id_streams, 0.0
        for key in ("bigram", "trigram"):
            rows = params[f"arms/ngram/{key}"][0][numpy_ids(streams[key], IDS)]
            added += rows.sum(axis=2) if rows.ndim == 4 else rows
        # Every token of the batch gets an id of its own, with the sum as its embedding.
        embed = (dense["embed"][IDS] + added).reshape(-1, DENSE.model_dim)
        own = jnp.arange(IDS.size, dtype=jnp.int32).reshape(IDS.shape)
        plain = bind(
            dataclasses.replace(DENSE, num_layers=1, vocab_size=IDS.size),
            dense | {"embed": embed, "head": jnp.zeros((DENSE.model_dim, IDS.size))},
        )
        expected = plain(own).hidden_BTD
    else:
        table = params["arms/value_embedding/table"][0]
        rows = table[IDS].reshape(*IDS.shape, DENSE.num_kv_heads, DENSE.head_size)

        def change(query, key, value, _):
            return AttentionResult(causal(query, key, value + rows, kind="xla"), None)

        expected = plain(jnp.asarray(IDS, jnp.int32), attend=change).hidden_BTD
    found = bind(model, params)(jnp.asarray(IDS, jnp.int32)).hidden_BTD
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_adds_to_the_backbone_and_changes_none_of_it(name):
    dense, model = init_params(DENSE, jax.random.key(3)), model_with(name)
    params = with_ngrams(model, init_params(model, jax.random.key(3)))
    for key, value in dense.items():
        np.testing.assert_array_equal(params[key], value, err_msg=key)
    ids = random_ids(DENSE, 2, 9)
    same = np.array_equal(bind(model, params)(ids).hidden_BTD, bind(DENSE, dense)(ids).hidden_BTD)
    assert same == (name in SAME_AT_FIRST), f"SAME_AT_FIRST is wrong about {name}"


def test_no_token_sees_a_later_one():
    params = with_ngrams(EVERYTHING, moved(init_params(EVERYTHING, jax.random.key(0))))
    ids = np.array(random_ids(DENSE, 1, 9))
    before = bind(EVERYTHING, params)(jnp.asarray(ids)).hidden_BTD
    ids[0, 5] = (ids[0, 5] + 1) % DENSE.vocab_size
    after = bind(EVERYTHING, params)(jnp.asarray(ids)).hidden_BTD
    np.testing.assert_allclose(before[:, :5], after[:, :5], rtol=1e-6, atol=1e-6)
    assert not np.allclose(before[:, 5:], after[:, 5:])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_row_gradients_of_every_table_are_those_of_plain_autodiff(accumulation):
    """Against dense gradients of the whole tables, which no plan and no kernel makes."""
    config = run_with(EVERYTHING, grad_accumulation=accumulation)
    params = with_ngrams(config.model, moved(init_params(config.model, jax.random.key(0)), 0.1))
    ids = random_ids(DENSE, 4, 16)
    targets = (ids + 1) % DENSE.vocab_size
    losses, found = jax.jit(lambda p: gradients(config, p, ids, targets))(params)

    def loss(trained, ids, targets):
        model = bind(config.model, params | trained)
        output = model(ids)
        logits = (output.hidden_BTD @ model.head_DV)[..., : DENSE.vocab_size]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
        penalty = jax.nn.logsumexp(logits, axis=-1) ** 2
        balance = config.model.jtok.balance_weight * output.jtok_balance
        return -chosen.mean() + config.train.z_loss * penalty.mean() + balance

    # Microbatches are strided, and their gradients averaged.
    grads = [jax.grad(loss)(numbers_of(params), ids[i::accumulation], targets[i::accumulation])
             for i in range(accumulation)]  # fmt: skip
    expected = jax.tree.map(lambda *leaves: sum(leaves) / accumulation, *grads)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=2e-6, err_msg=name)
    assert np.isfinite(losses.loss)


@pytest.mark.parametrize("kind", ["adamw", "lazy_adam", "rowwise_adam", "rowwise_adagrad"])
def test_every_parameter_learns_and_rows_that_are_not_read_stay(kind):
    config = run_with(EVERYTHING, kind)
    state, step, _ = training(config)
    ids = random_ids(DENSE, 4, 16)
    first = state.params
    for _ in range(2):  # what is behind zeros gets no gradient in the first
        state, metrics = step(state, ids, (ids + 1) % DENSE.vocab_size)
    assert np.isfinite(metrics.loss)
    for key in numbers_of(first):
        assert not np.array_equal(first[key], state.params[key]), key
    for name, table in declared_tables(config.model).items():
        stream = config.model.id_streams[table.stream]
        index = indices_of(first).get(stream.name)
        read = np.unique(np.asarray(stream_ids(stream, ids, index=index)))
        unread = np.setdiff1d(np.arange(table.shape[-2]), read)
        assert unread.size or stream.name == "token", "a test that cannot fail"
        same = np.asarray(first[name])[..., unread, :]
        np.testing.assert_array_equal(same, np.asarray(state.params[name])[..., unread, :], name)


def test_bfloat16_tables_learn():
    arms = dataclasses.replace(EVERYTHING.arms, table_dtype="bfloat16")
    config = run_with(dataclasses.replace(EVERYTHING, arms=arms))
    state, step, _ = training(config)
    ids = random_ids(DENSE, 4, 16)
    after, metrics = step(state, ids, (ids + 1) % DENSE.vocab_size)
    assert np.isfinite(metrics.loss)
    for name, table in declared_tables(config.model).items():
        assert after.params[name].dtype == table.dtype
        assert "arms" not in name or table.dtype == jnp.bfloat16
        assert not np.array_equal(state.params[name], after.params[name]), name


def still_after_two_steps(**options) -> tuple[set[str], dict[str, object]]:
    """Return the parameters that did not move, and the optimizer's state, for options of tables."""
    config = run_with(EVERYTHING)
    tables = dataclasses.replace(config.optimizer.tables, **options)
    optimizer = dataclasses.replace(config.optimizer, tables=tables)
    state, step, _ = training(dataclasses.replace(config, optimizer=optimizer))
    ids, after = random_ids(DENSE, 4, 16), state
    for _ in range(2):
        after, _ = step(after, ids, ids)
    still = {
        n for n, value in numbers_of(state.params).items() if np.array_equal(value, after.params[n])
    }
    return still, state.opt_state


def test_tables_have_the_options_of_tables():
    """Rate 0 keeps them as they are, and them alone."""
    still, _ = still_after_two_steps(learning_rate_multiplier=0.0)
    assert still == set(declared_tables(EVERYTHING))


def test_the_tables_of_a_layer_may_have_options_of_their_own():
    """Another optimizer, and rate 0: they stay as they are, and they alone."""
    own = "value_embedding.learning_rate_multiplier=0, jtok.kind=adamw"
    still, states = still_after_two_steps(overrides=own)
    assert still == {"arms/value_embedding/table"}
    lazy = {name for name in declared_tables(EVERYTHING) if "m_weight" in states[name]}
    assert lazy == set(declared_tables(EVERYTHING)) - {"tables"}


def test_jtok_keyed_by_bigrams_is_jtok_of_their_ids():
    """The same as JTok whose tokens are the bigrams' rows."""
    jtok = dataclasses.replace(JTOK, stream="bigram")
    ours = dataclasses.replace(DENSE, jtok=jtok, streams="bigram=2:29")
    params = moved(init_params(ours, jax.random.key(0)), 0.2)
    ids = jnp.asarray(IDS, jnp.int32)
    rows = numpy_ids(ours.id_streams["bigram"], IDS)
    theirs = dataclasses.replace(DENSE, jtok=JTOK, vocab_size=IDS.size)
    # Every token gets an id of its own, with its embedding and the row of its bigram.
    own = jnp.arange(IDS.size, dtype=jnp.int32).reshape(IDS.shape)
    same = params | {
        "embed": params["embed"][IDS.reshape(-1)],
        "head": jnp.zeros((DENSE.model_dim, IDS.size)),
        "tables": params["tables"][:, rows.reshape(-1)],
    }
    expected = bind(theirs, same)(own).hidden_BTD
    np.testing.assert_allclose(bind(ours, params)(ids).hidden_BTD, expected, rtol=1e-5, atol=1e-5)


def test_counts_are_those_of_the_parameters():
    params, counts = init_params(EVERYTHING, jax.random.key(0)), flops.count(EVERYTHING, seq_len=16)
    params = numbers_of(params)
    tables = sum(params[name].size for name in declared_tables(EVERYTHING))
    assert counts.tables == tables
    assert counts.total == sum(leaf.size for leaf in params.values())
    count = lambda name: flops.count(model_with(name), seq_len=16).forward_flops
    film, adapter, low_rank = ArmsConfig().film, ArmsConfig().adapter, ArmsConfig().low_rank
    layers, dim = DENSE.num_layers, DENSE.model_dim
    assert count("film") - count("") == 2 * layers * 3 * dim * film.rank
    assert count("adapter") - count("") == 2 * layers * 2 * dim * adapter.width
    assert count("low_rank") - count("") == 2 * layers * dim * low_rank.rank
    for name in ("deep_embed", "ngram", "value_embedding"):
        assert count(name) == count("")
    assert all(one.axes for one in declared(EVERYTHING).values())


@pytest.mark.parametrize("names", ["jtok", "film, jtok", "film, film"])
def test_names_that_are_no_arms_are_refused(names):
    with pytest.raises(ConfigError, match=r"model.arms.names .* each once"):
        ArmsConfig(names=names)
    assert [*ArmsConfig(names="ngram, film").chosen()] == ["ngram", "film"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"streams": "bigram"}, "expected NAME=ORDER:ROWS"),
    ({"streams": "bigram=1:9"}, "order of bigram is 1; expected at least 2"),
    ({"streams": "bigram=2:0"}, "rows of bigram is 0; expected at least 1"),
    ({"streams": "bigram=2:9:0"}, "heads of bigram is 0; expected at least 1"),
    ({"streams": "bigram=2:9, bigram=3:9"}, "declares 'bigram' twice"),
    ({"streams": "token=2:9"}, "declares 'token' twice, or it is the token's own"),
    ({"streams": "bigram=2:9999999999"}, "9999999999 rows; ids are int32"),
    ({"streams": "bigram=2:9"}, "declares bigram, which no table reads"),
    ({"arms": ArmsConfig(names="ngram")}, "ngram.streams names 'bigram', but the id streams are"),
    ({"jtok": dataclasses.replace(JTOK, stream="x")}, "model.jtok.stream names 'x'"),
    ({"jtok": dataclasses.replace(JTOK, stream="x"), "streams": "x=2:9:2"}, "several hash heads"),
])  # fmt: skip
def test_streams_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(DENSE, **changes)


@pytest.mark.parametrize(("name", "options", "message"), [
    ("film", {"rank": 0}, "model.arms.film.rank is 0; expected at least 1"),
    ("low_rank", {"norm": "max"}, "model.arms.low_rank.norm is 'max'; expected one of l2, rms"),
    ("value_embedding", {"init_std": -1.0}, "model.arms.value_embedding.init_std is -1.0"),
    ("ngram", {"streams": "a,a"}, "expected names of id streams, each once"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(getattr(ArmsConfig(), name), **options)


@pytest.mark.parametrize("kind", ["lazy_adam", "rowwise_adagrad"])
def test_memory_of_a_step_does_not_grow_with_the_tables(kind):
    """No table, no layer of one and no gradient of its size is ever copied."""

    def compiled(rows: int):
        streams = f"a=2:{rows}, b=2:{rows + 8}, c=3:{rows}:2, frequent=4:{rows - 1}:frequent"
        arms = ArmsConfig(
            names=",".join(ARMS), ngram=NgramConfig("b,c"), deep_embed=DeepEmbedConfig("a"),
            low_rank=LowRankConfig("b"), value_embedding=ValueEmbeddingConfig("a"),
            scone=SconeConfig(kind="table"),
        )  # fmt: skip
        jtok = dataclasses.replace(JTOK_M, stream="a")
        model = dataclasses.replace(DENSE, jtok=jtok, arms=arms, streams=streams)
        config, mesh = run_with(model, kind), one_device()
        optimizer = make_optimizer(config)
        ids = jax.ShapeDtypeStruct((4, 16), jnp.int32)
        step = jit_train_step(config, optimizer, mesh)
        state = abstract_state(config, optimizer, mesh)
        return step.lower(state, ids, ids).compile().memory_analysis()

    small, large = compiled(4 * 64), compiled(64 * 64)
    assert large.argument_size_in_bytes > 5 * small.argument_size_in_bytes
    assert large.temp_size_in_bytes < 1.02 * small.temp_size_in_bytes
    assert large.alias_size_in_bytes > 0.99 * large.output_size_in_bytes  # in place
