# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Growing a TokenFormer: what it computes stays, and training goes on."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pythons import oldest
from small import DENSE, JTOK_M, random_ids, random_params, with_every_table
from test_config import changed
from test_data import run_config
from test_train_loop import records

from jtok_jax import grow
from jtok_jax.config import Config
from jtok_jax.errors import ConfigError, DataError
from jtok_jax.grow import Growth, grown_model, grown_params
from jtok_jax.inference.cache import logits
from jtok_jax.loading import load
from jtok_jax.model.ngram_index import indices_of
from jtok_jax.model.params import bind
from jtok_jax.model.tables import stream_ids
from jtok_jax.model_config import ModelConfig
from jtok_jax.pretrained import model_of
from jtok_jax.training.saved import load_params
from train import train

pytestmark = oldest
ALL = {"model.pattention.kind": "all", "model.pattention.slots": 10}
ALL |= {"model.pattention.ffn_slots": 22, "model.block_norm": "weightless_layer"}


def small(**fields) -> ModelConfig:
    return changed(Config(model=DENSE), ALL | fields).model


def logits_of(model: ModelConfig, params) -> np.ndarray:
    """Return those of an optimized program: only such ones fuse, and sum in blocks."""
    ids = random_ids(model, 2, 16, seed=3)
    run = jax.jit(lambda params: logits(bound := bind(model, params), bound(ids).hidden_BTD))
    options = {"xla_backend_optimization_level": 3}
    return np.asarray(run.lower(params).compile(compiler_options=options)(params))


@pytest.mark.parametrize("form", ["safe", "torch", "tpu"])
def test_two_growths_change_no_bit(form):
    model = small(**{"model.pattention.form": form})
    params = random_params(model)
    first = logits_of(model, params)
    for slots, ffn_slots in ((13, 64), (40, 0)):
        before, model = model, grown_model(model, Growth(slots, ffn_slots))
        params = grown_params(model, before, params, keys="zero", seed=5)
        np.testing.assert_array_equal(logits_of(model, params), first)
        assert model.pattention != before.pattention
    assert model.pattention.grown_from == "10,13"
    assert model.pattention.ffn_grown_from == "22"


def test_new_slots_learn_unless_their_values_are_zero_too():
    model = grown_model(small(), Growth(16))
    params = grown_params(model, small(), random_params(small()), keys="zero", seed=5)
    ids = random_ids(model, 2, 16, seed=3)
    score = lambda params: logits(bound := bind(model, params), bound(ids).hidden_BTD)[..., 0].sum()
    grads = jax.grad(score)(params)
    new = {name: np.asarray(grads[f"blocks/attention/query/{name}"])[:, 10:]
           for name in ("key", "value")}  # fmt: skip
    assert (new["key"] != 0).any(axis=-1).all()
    assert not new["value"].any()  # weights are zero until keys have moved
    name = "blocks/attention/query/value"
    dead = params | {name: np.asarray(params[name]) * (np.arange(16) < 10)[:, None]}
    grads = jax.grad(score)(dead)
    assert not np.asarray(grads["blocks/attention/query/key"])[:, 10:].any()
    larger = grown_model(model, Growth(17))
    with pytest.raises(ConfigError, match=r"18 slots of blocks/attention/query have keys and val"):
        grown_params(larger, model, dead, keys="zero", seed=5)
    grown_params(grown_model(model, Growth(0, 30)), model, dead, seed=5)  # other maps grow


def test_dense_heads_of_zeros_are_no_slots():
    """A key and a value of a head, set to zero by who prunes it, hinder no growth."""
    before = small(**{"model.pattention.kind": "ffn"})
    params = random_params(before)
    pruned = params | {
        f"blocks/attention/{name}": np.zeros_like(params[f"blocks/attention/{name}"])
        for name in ("key", "value")
    }
    grown_params(grown_model(before, Growth(0, 30)), before, pruned, seed=5)


def test_the_published_way_changes_the_model():
    """Random keys, and the factor of all slots: another result, which is no growth of ours."""
    model = grown_model(small(), Growth(20, 44, keys="random"))
    params = grown_params(model, small(), random_params(small()), keys="random", seed=5)
    assert (model.pattention.grown_from, model.pattention.ffn_grown_from) == ("", "")
    assert np.asarray(params["blocks/ffn/map/key"])[:, 22:].any()
    old = logits_of(small(), random_params(small()))
    assert np.abs(logits_of(model, params) - old).max() > 0.1


def test_a_run_is_grown_and_goes_on(corpus, tmp_path, capsys):
    """Its first step has the loss that the run before would have had."""
    start = run_config(corpus, steps=4)
    model = dataclasses.replace(small(), vocab_size=300)
    train(dataclasses.replace(start, model=model), tmp_path / "small")
    grow.main([f"--from={tmp_path}/small", f"--output={tmp_path}/grown", "--slots=24"])
    printed = capsys.readouterr().out
    assert "parameters and 0 of tables" in printed
    assert f"--config.train.seed={start.train.seed + 1}\n" in printed
    assert (tmp_path / "grown" / "tokenizer.json").exists()
    found = model_of(str(tmp_path / "grown"))["pattention"]
    assert (found["slots"], found["grown_from"], found["ffn_slots"]) == (24, "10", 22)
    left, right = (load_params(tmp_path / name) for name in ("small", "grown"))
    np.testing.assert_array_equal(
        logits_of(left.config.model, left.params), logits_of(right.config.model, right.params)
    )
    after = {}
    for name in ("small", "grown"):
        saved = load_params(tmp_path / name).config.model
        config = dataclasses.replace(start, model=saved, init_from=str(tmp_path / name))
        train(config, tmp_path / f"after {name}")
        after[name] = [record["loss"] for record in records(tmp_path / f"after {name}")[1:]]
    assert after["grown"][0] == pytest.approx(after["small"][0], rel=1e-6)
    assert after["grown"][-1] != after["small"][-1]
    assert after["grown"][-1] < after["grown"][0]


@pytest.mark.parametrize("kind", ["jtok", "jtok_m"])
@pytest.mark.parametrize("sharing", ["per_layer", "shared"])
def test_more_layers_get_tables(kind, sharing):
    """No bit changes while some have none: that all have them makes another program."""
    fields = {"model.jtok.kind": kind, "model.jtok.layers": "1", "model.jtok.sharing": sharing}
    before = changed(Config(model=dataclasses.replace(DENSE, jtok=JTOK_M)), fields).model
    params = random_params(before)
    for layers, close in (("0,1", 0), ("all", 1e-5)):
        model = grown_model(before, Growth(jtok_layers=layers))
        grown = grown_params(model, before, params, keys="zero", seed=5)
        found, expected = logits_of(model, grown), logits_of(before, params)
        np.testing.assert_allclose(found, expected, rtol=0, atol=close)
    assert len(grown["tables"]) == (1 if sharing == "shared" else 3)
    ids = random_ids(model, 2, 16, seed=3)
    score = lambda params: jnp.square(bind(model, params)(ids).hidden_BTD).sum()
    grads = jax.grad(lambda params: score(params) + params["embed"].sum())(grown)
    assert np.asarray(grads["blocks/jtok/scale"]).any(axis=-1).all()  # so new layers learn


def test_new_tables_of_jtok_m_are_read_beside_the_old_choice_and_learn():
    """A norm divides by the share that zeros take of the weights: bits differ, by rounding."""
    before = dataclasses.replace(DENSE, jtok=dataclasses.replace(JTOK_M, layers="0,2"))
    params = random_params(before)
    model = grown_model(before, Growth(jtok_tables=7))
    assert (model.jtok.num_tables, model.jtok.top_k, model.jtok.router_bias) == (7, 4, True)
    grown = grown_params(model, before, params, seed=5)
    assert not np.asarray(grown["tables"])[:, 5:].any()
    np.testing.assert_allclose(
        logits_of(model, grown), logits_of(before, params), rtol=1e-4, atol=1e-4
    )
    ids = random_ids(model, 2, 16, seed=3)
    score = lambda params: logits(bound := bind(model, params), bound(ids).hidden_BTD)[..., 0].sum()
    grads = jax.grad(score)({name: jnp.asarray(value) for name, value in grown.items()})
    assert np.asarray(grads["tables"])[:, 5:].any(axis=(2, 3)).all()
    assert np.asarray(grads["blocks/jtok/router_bias"])[0, 5:].all()


@pytest.mark.parametrize("name", ["dense", "every table", "tied, padded"])
def test_more_tokens_leave_the_logits_of_the_old_ones(name):
    """No bit changes. Hashed n-grams keep their rows, frequent ones are found as before."""
    before = with_every_table(dataclasses.replace(DENSE, jtok=JTOK_M))
    streams = before.streams.replace("bigram=2:38", "bigram=2:2V")
    before = {
        "dense": DENSE, "every table": dataclasses.replace(before, streams=streams),
        "tied, padded": dataclasses.replace(before, head="tied", vocab_multiple=16),
    }[name]  # fmt: skip
    params = random_params(before)
    model = grown_model(before, Growth(vocab_size=41))
    grown = grown_params(model, before, params, seed=5)
    ids = random_ids(before, 2, 16, seed=3)
    run = lambda model, params: np.asarray(
        jax.jit(lambda params: logits(bound := bind(model, params), bound(ids).hidden_BTD))(params)
    )
    np.testing.assert_allclose(run(model, grown)[..., :29], run(before, params), atol=1e-5)
    assert grown["embed"][29:41].any(axis=1).all()
    assert not grown["embed"][41:].any()
    if name != "dense":
        stream, index = model.id_streams["frequent"], indices_of(grown)["frequent"]
        found, expected = (
            stream_ids(one, ids, index=of) for one, of in (
                (stream, index), (before.id_streams["frequent"], indices_of(params)["frequent"])
            )
        )  # fmt: skip
        np.testing.assert_array_equal(found, expected)
        assert (expected > 0).any()
        assert grown["tables"].shape[-2] == model.padded_vocab
    if name == "every table":
        assert "bigram=2:58," in model.streams


def test_a_run_with_more_tokens_goes_on(corpus, tmp_path):
    start = run_config(corpus, steps=3)
    model = dataclasses.replace(start.model, jtok=JTOK_M)
    train(dataclasses.replace(start, model=model), tmp_path / "small")
    words, made = tmp_path / "words.json", json.loads((corpus / "tokenizer.json").read_text())
    made["model"]["vocab"] |= {f"<new {number}>": 300 + number for number in range(10)}
    words.write_text(json.dumps(made))
    grow.main([
        f"--from={tmp_path}/small", f"--output={tmp_path}/grown", "--vocab_size=310",
        "--jtok_tables=6", f"--tokenizer={words}",
    ])  # fmt: skip
    assert load(tmp_path / "grown").tokenizer.get_vocab_size() == 310
    found = load_params(tmp_path / "grown").config.model
    assert (found.vocab_size, found.jtok.num_tables) == (310, 6)
    config = dataclasses.replace(start, model=found, init_from=str(tmp_path / "grown"))
    with pytest.raises(DataError, match="was cut by another tokenizer than"):
        train(config, tmp_path / "after")
    shutil.copy(corpus / "tokenizer.json", tmp_path / "grown")  # whose ids are the same
    train(config, tmp_path / "after")
    first, last = records(tmp_path / "small")[-1], records(tmp_path / "after")[0]
    assert first["val_loss"] <= last["val_loss"] < first["val_loss"] + 0.1  # ten tokens more


def test_a_tokenizer_without_the_old_tokens_or_with_too_many_is_refused(corpus, tmp_path):
    train(run_config(corpus, steps=1), tmp_path / "small")
    made = json.loads((corpus / "tokenizer.json").read_text())
    vocab = made["model"]["vocab"]
    vocab |= {"<new>": 300, "<newer>": 301}
    (tmp_path / "more.json").write_text(json.dumps(made))
    first, second = list(vocab)[5:7]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "others.json").write_text(json.dumps(made))
    for name, size, reason in (
        ("others", 302, "2 tokens of the run not under their ids"),
        ("more", 301, "has ids up to 301, the model 301"),
    ):
        growth, words = Growth(vocab_size=size), tmp_path / f"{name}.json"
        with pytest.raises(ConfigError, match=reason):
            grow.grow(str(tmp_path / "small"), tmp_path / "grown", growth, words=words)
    grow.grow(str(tmp_path / "small"), tmp_path / "grown", Growth(vocab_size=302),
              words=tmp_path / "more.json")  # fmt: skip


@pytest.mark.parametrize(("fields", "slots", "message"), [
    ({}, (9, 0), "--slots is 9; the model has 10, and none are removed"),
    ({}, (10, 22), "Nothing grows"),
    ({}, (0, 0), "Nothing grows"),
    ({"model.pattention.kind": "ffn"}, (20, 0), "are those of attention, which has none"),
    ({"model.pattention.kind": "none"}, (20, 0), "there are no slots to grow"),
    ({}, (0, 0, "all"), "there are no tables, so init_from adds them"),
    ({"model.jtok.kind": "jtok"}, (0, 0, "0,1"), r"leaves out layers \[2\], which have tables"),
    ({"model.jtok.kind": "jtok"}, (0, 0, "all"), "Nothing grows"),
    ({"model.jtok.kind": "jtok"}, (0, 0, "", 7), "--jtok_tables is of JTok-M"),
    ({"model.jtok.kind": "jtok_m"}, (0, 0, "", 4), "--jtok_tables is 4; the model has 5"),
    ({"model.jtok.kind": "jtok_m"}, (0, 0, "", 5, 29), "Nothing grows"),
    ({}, (0, 0, "", 0, 28), "--vocab_size is 28; the model has 29"),
])  # fmt: skip
def test_what_cannot_grow_is_refused(fields, slots, message):
    with pytest.raises(ConfigError, match=message):
        grown_model(small(**fields), Growth(*slots))


@pytest.mark.parametrize("text", ["10", "12", "4,3", "4,4", "x", "0"])
def test_a_history_that_cannot_be_is_refused(text):
    with pytest.raises(ConfigError, match=r"model\.pattention\.grown_from is "):
        small(**{"model.pattention.grown_from": text})
