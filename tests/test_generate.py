# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Cached decoding equals the full forward pass; sampling does what its options say."""

import argparse
import dataclasses
import functools
import math
import re

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
from jtok_jax.inference.sampling import Sampling, _most_likely, sample
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
    many = jnp.broadcast_to(jnp.float32(logits), (count, len(logits)))
    drawn = jax.jit(sample)(many, keys, options.without_neutral(len(logits)))
    return np.bincount(drawn, minlength=len(logits)) / count


def test_sampling_frequencies():
    logits = np.log([0.5, 0.1, 0.3, 0.1])
    np.testing.assert_allclose(_frequencies(logits, Sampling()), np.exp(logits), atol=0.03)
    hot = np.exp(logits / 2) / np.exp(logits / 2).sum()
    np.testing.assert_allclose(_frequencies(logits, Sampling(temperature=2.0)), hot, atol=0.03)
    top_2 = [0.625, 0, 0.375, 0]
    np.testing.assert_allclose(_frequencies(logits, Sampling(top_k=2)), top_2, atol=0.03)
    np.testing.assert_allclose(_frequencies(logits, Sampling(top_p=0.7)), top_2, atol=0.03)
    both = Sampling(top_k=2, top_p=0.55)  # of all probabilities, not of those of the two
    np.testing.assert_allclose(_frequencies(logits, both), top_2, atol=0.03)
    only = [1, 0, 0, 0]
    np.testing.assert_array_equal(_frequencies(logits, Sampling(top_p=0.01)), only)
    np.testing.assert_array_equal(_frequencies(logits, Sampling(temperature=0.0)), only)


def test_top_p_keeps_the_smallest_set_and_what_is_as_likely_as_its_last():
    """Against sorting in float64, over blocks of ids and with many equal logits."""
    rng = np.random.default_rng(0)
    logits = np.round(2 * rng.standard_normal((6, 300)), 1).astype(np.float32)
    for top_p in (1e-6, 0.3, 0.9, 0.999):
        weights = jnp.exp(logits - logits.max(axis=1, keepdims=True))
        kept = np.asarray(_most_likely(weights, np.float32(top_p) * weights.sum(axis=1))) > 0
        for row, one in zip(np.float64(weights), kept, strict=True):
            heavier = np.array([row[row > x].sum() for x in row])
            np.testing.assert_array_equal(one, heavier < top_p * row.sum())
    ids = sample(jnp.asarray(logits), jax.random.split(jax.random.key(0), 6), Sampling(1.0, 0, 0.3))
    weights = np.float64(np.exp(logits))
    drawn = weights[np.arange(6), ids]
    heavier = np.where(weights > drawn[:, None], weights, 0).sum(axis=1)
    assert np.all(heavier < 0.3 * weights.sum(axis=1))


def test_neutral_options_change_nothing_and_a_text_depends_on_its_prompt_alone():
    """Other places and other prompts in the batch; padded lengths stay the same."""
    config = KINDS["dense-jtok_m"]
    prompts = [[3, 4, 5], [6], [7, 8, 9, 10, 11], [6]]
    write = functools.partial(generate, config, random_params(config), tokens=12, seed=3)
    whole = write(prompts, sampling=Sampling(1.5))
    for same in (Sampling(1.5, 29), Sampling(1.5, 1000, None), Sampling(1.5, 0, 1.0)):
        np.testing.assert_array_equal(write(prompts, sampling=same), whole)
    greedy = write(prompts, sampling=Sampling(0.0))
    np.testing.assert_array_equal(write(prompts, sampling=Sampling(0.0, 3, 0.5)), greedy)
    np.testing.assert_array_equal(write(prompts, sampling=Sampling(2.0, 1)), greedy)
    assert np.any(whole[1] != whole[3])  # equal prompts have texts of their own
    for limits in ((0, 1.0), (7, 1.0), (0, 0.9), (20, 0.9)):
        sampling = Sampling(1.5, *limits)
        whole = write(prompts, sampling=sampling)
        order = [2, 1, 0, 3]
        turned = write([prompts[i] for i in order], sampling=sampling)
        np.testing.assert_array_equal(turned, whole[order])
        for row in (0, 1, 2):
            np.testing.assert_array_equal(write([prompts[row]], sampling=sampling)[0], whole[row])


@pytest.mark.parametrize("name", ["dense-jtok_m", "moe-jtok_m", "mixed"])
def test_a_step_copies_no_cache(name):
    """Every layer's keys and values are updated where they lie, if donated."""
    config, batch, places = MODELS[name], 3, 448  # a size that nothing else has
    params = random_params(config)
    ids, lengths = random_ids(config, batch, 8), jnp.full(batch, 8, jnp.int32)
    read = functools.partial(prefill, capacity=places)
    cache = jax.eval_shape(lambda params: read(bind(config, params), ids, lengths).cache, params)
    keys = jax.random.split(jax.random.key(0), batch)
    arguments = params, ids[:, 0], cache, keys, Sampling(1.0, 5, 0.9), None
    program = generator._decode.lower(config, *arguments).compile()
    size = (batch, config.num_kv_heads, places, config.head_size)
    assert {x.shape for pair in cache.layers for x in pair} == {size}
    kept = 2 * config.num_layers * 4 * math.prod(size)
    sizes = program.memory_analysis()
    assert sizes.alias_size_in_bytes >= kept
    assert sizes.temp_size_in_bytes < kept / 2
    shape = ",".join(map(str, size))
    made = re.findall(rf"= f32\[{shape}\]\S* ([\w-]+)\(", program.as_text())
    assert made
    assert not {*made} & {"copy", "concatenate", "transpose", "scatter", "dynamic-slice"}


def test_padding_of_the_vocabulary_has_no_logits():
    model = dataclasses.replace(KINDS["dense-jtok"], vocab_multiple=16)
    params = bind(model, random_params(model))
    ids = random_ids(model, 2, 8)
    logits, cache = prefill(params, ids, jnp.int32([8, 8]), capacity=16)
    assert logits.shape == decode(params, ids[:, 0], cache).logits_BV.shape == (2, 29)


@pytest.mark.parametrize(("changes", "message"), [
    ({"prompt": ["a", "\udcff"]}, r"--prompt='\\udcff' is not UTF-8"),
    ({"temperature": float("nan")}, "temperature is nan; expected a finite number"),
    ({"top_k": -1}, "top_k is -1; expected at least 0"),
    ({"top_p": 0.0}, "top_p is 0.0; expected more than 0"),
    ({"seed": 2**32}, "--seed between 0 and"),
    ({"tokens": 0}, "--tokens must be at least 1"),
])  # fmt: skip
def test_options_that_cannot_be_are_refused_before_anything_is_read(changes, message, tmp_path):
    options = {"tokens": 1, "temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": 0}
    options |= {"prompt": ["a"], "prompts": None, "workdir": tmp_path, "data": None} | changes
    with pytest.raises(ConfigError, match=message):
        run(argparse.Namespace(**options))
