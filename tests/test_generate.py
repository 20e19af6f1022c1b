# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Cached decoding equals the full forward pass; sampling does what its options say."""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import KINDS, random_ids, random_params, with_every_table

from jtok_jax.errors import ConfigError, DataError
from jtok_jax.generate import run
from jtok_jax.inference import generator
from jtok_jax.inference.cache import decode, prefill
from jtok_jax.inference.generator import generate
from jtok_jax.inference.sampling import Sampling, sample
from jtok_jax.model.params import bind

LENGTHS = [5, 1, 8, 3]
MIXED = dataclasses.replace(
    KINDS["moe-jtok_m"],
    qk_norm="rms",
    head="tied",
    jtok=dataclasses.replace(KINDS["moe-jtok_m"].jtok, layers="0,2", sharing="shared"),
)


MODELS = KINDS | {"mixed": MIXED, "every table": with_every_table(KINDS["dense-jtok_m"])}


@pytest.mark.parametrize("name", MODELS)
def test_cached_decoding_equals_the_full_forward(name):
    """Prompts of four lengths in one batch, then six more tokens each."""
    config = MODELS[name]
    params = random_params(config)
    model = bind(config, params)
    ids, lengths = random_ids(config, 4, 14), jnp.array(LENGTHS)
    full = jax.jit(lambda model, ids: model(ids).hidden_BTD @ model.head_DV)(model, ids)
    padded = jnp.where(jnp.arange(8) < lengths[:, None], ids[:, :8], 17)
    logits, cache = jax.jit(prefill, static_argnames="capacity")(
        model, padded, lengths, capacity=14
    )
    step = jax.jit(decode)
    compiled = step._cache_size()
    rows = jnp.arange(4)
    for extra in range(6):
        expected = full[rows, lengths + extra - 1]
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4, err_msg=f"{extra}")
        logits, cache = step(model, ids[rows, lengths + extra], cache)
    assert step._cache_size() == compiled + 1


def test_one_decode_step_is_compiled_and_rows_do_not_affect_each_other():
    config = KINDS["dense-jtok_m"]
    params = random_params(config)
    greedy = Sampling(temperature=0.0)
    prompts = [[3, 4, 5], [6], [7, 8, 9, 10, 11]]
    before = generator._decode._cache_size()
    together = generate(config, params, prompts, tokens=9, sampling=greedy, seed=0)
    assert generator._decode._cache_size() == before + 1
    assert together.shape == (3, 9)
    for row, prompt in enumerate(prompts):
        alone = generate(config, params, [prompt], tokens=9, sampling=greedy, seed=1)
        np.testing.assert_array_equal(alone[0], together[row])
    drawn = generate(config, params, prompts, tokens=9, sampling=Sampling(2.0, 5, 0.9), seed=0)
    again = generate(config, params, prompts, tokens=9, sampling=Sampling(2.0, 5, 0.9), seed=0)
    other = generate(config, params, prompts, tokens=9, sampling=Sampling(2.0, 5, 0.9), seed=1)
    np.testing.assert_array_equal(drawn, again)
    assert np.any(drawn != other)


def test_generation_ends_when_every_text_has_ended():
    config = KINDS["dense-jtok_m"]
    make = functools.partial(
        generate, config, random_params(config), [[3, 4, 5], [6]],
        tokens=60, sampling=Sampling(), seed=0,
    )  # fmt: skip
    whole = make()
    assert whole.shape == (2, 60)
    everywhere = [i for i in range(29) if np.any(whole == i, axis=1).all()]
    ended = {i: np.argmax(whole == i, axis=1).max() + 1 for i in everywhere}  # tokens of the longer
    early = min(ended, key=ended.get)
    looked = -(-ended[early] // generator.ENDED_EVERY) * generator.ENDED_EVERY
    assert looked < 60
    np.testing.assert_array_equal(make(end_id=early), whole[:, :looked])
    one = next(i for i in range(29) if np.any(whole == i, axis=1).sum() == 1)  # in one text alone
    np.testing.assert_array_equal(make(end_id=one), whole)


@pytest.mark.parametrize("name", ["dense-jtok", "moe-jtok_m"])
def test_matrices_in_the_compute_dtype_give_the_same_bits(name):
    config = dataclasses.replace(KINDS[name], compute_dtype="bfloat16", qk_norm="rms")
    params = random_params(config)
    given, last = dict(params), jnp.int32([7])
    narrow = generator.for_inference(config, given)
    assert not given
    assert params.keys() == narrow.keys()
    kept = {name for name, value in narrow.items() if value.dtype == jnp.float32}
    norms = {"final_norm", *(f"blocks/attention/{x}" for x in ("norm", "query_norm", "key_norm"))}
    of = {"dense-jtok": {"ffn/norm"}, "moe-jtok_m": {"moe/norm", "moe/router", "jtok/router"}}
    assert kept == norms | {"tables", "blocks/jtok/scale", *(f"blocks/{x}" for x in of[name])}
    ids = random_ids(config, 1, 7)
    run = jax.jit(lambda params: prefill(bind(config, params), ids, last, capacity=8))
    jax.tree.map(np.testing.assert_array_equal, run(params), run(narrow))


def test_bad_prompts_are_refused():
    config = KINDS["dense"]
    params = random_params(config)
    with pytest.raises(ConfigError, match="empty"):
        generate(config, params, [[1], []], tokens=1, sampling=Sampling(), seed=0)
    with pytest.raises(DataError, match=r"Token id 29 outside \[0, 29\) in prompt 1"):
        generate(config, params, [[1], [2, 29]], tokens=1, sampling=Sampling(), seed=0)


def _frequencies(logits, options, count=4000):
    keys = jax.random.split(jax.random.key(0), count)
    drawn = jax.vmap(lambda key: sample(jnp.array([logits]), key, options)[0])(keys)
    return np.bincount(drawn, minlength=len(logits)) / count


def test_sampling_frequencies():
    logits = np.log([0.5, 0.1, 0.3, 0.1])
    np.testing.assert_allclose(_frequencies(logits, Sampling()), np.exp(logits), atol=0.03)
    hot = np.exp(logits / 2) / np.exp(logits / 2).sum()
    np.testing.assert_allclose(_frequencies(logits, Sampling(temperature=2.0)), hot, atol=0.03)
    top_2 = [0.625, 0, 0.375, 0]
    np.testing.assert_allclose(_frequencies(logits, Sampling(top_k=2)), top_2, atol=0.03)
    np.testing.assert_allclose(_frequencies(logits, Sampling(top_p=0.7)), top_2, atol=0.03)
    only = [1, 0, 0, 0]
    np.testing.assert_array_equal(_frequencies(logits, Sampling(top_p=0.01)), only)
    np.testing.assert_array_equal(_frequencies(logits, Sampling(temperature=0.0)), only)


def test_padding_of_the_vocabulary_has_no_logits():
    model = dataclasses.replace(KINDS["dense-jtok"], vocab_multiple=16)
    params = bind(model, random_params(model))
    ids = random_ids(model, 2, 8)
    logits, cache = prefill(params, ids, jnp.int32([8, 8]), capacity=16)
    assert logits.shape == decode(params, ids[:, 0], cache).logits_BV.shape == (2, 29)


@pytest.mark.parametrize(("changes", "message"), [
    ({"prompt": ["a", "\udcff"]}, r"--prompt='\\udcff' is not UTF-8"),
    ({"temperature": float("nan")}, "--temperature must be finite"),
    ({"seed": 2**32}, "--seed between 0 and"),
    ({"tokens": 0}, "--tokens must be at least 1"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused_before_anything_is_read(changes, message, tmp_path):
    options = {"tokens": 1, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": 0}
    options |= {"prompt": ["a"], "workdir": tmp_path, "data": None} | changes
    with pytest.raises(ConfigError, match=message):
        run(argparse.Namespace(**options))
