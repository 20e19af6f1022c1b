# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""SCONE: what tokens match, and A_f against running it on every n-gram alone, in float64."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from pythons import oldest
from small import DENSE, random_ids, random_ngrams, random_params
from test_config import changed

from jtok_jax import flops
from jtok_jax.config import Config
from jtok_jax.errors import ConfigError
from jtok_jax.inference.cache import decode, logits, prefill
from jtok_jax.model.ngram_index import build_index, frequent_ids, indices_of, ngrams_of
from jtok_jax.model.params import Params, bind, init_params
from jtok_jax.model.tables import stream_ids
from jtok_jax.model_config import ModelConfig

pytestmark = oldest
ROWS, VOCAB = 220, 13  # 146 of the 169 pairs, and 74 triples
FIELDS = {
    "vocab_size": VOCAB, "streams": f"frequent=4:{ROWS}:frequent", "arms.names": "scone",
    "arms.scone.num_layers": 2, "arms.scone.room": 4.0,
}  # fmt: skip
NARROW = {"arms.scone.model_dim": 10, "arms.scone.num_heads": 5, "arms.scone.ffn_dim": 9}


def scone(**fields) -> ModelConfig:
    """A small model whose A_f has other fields, `__` for a dot."""
    fields = FIELDS | {name.replace("__", "."): value for name, value in fields.items()}
    return changed(Config(model=DENSE), {f"model.{k}": v for k, v in fields.items()}).model


def known_ngrams(model: ModelConfig) -> dict[tuple, int]:
    """1 + the row of every frequent n-gram of `random_params`."""
    ngrams = random_ngrams(model.id_streams["frequent"])
    tokens, lengths = ngrams.tokens(np.arange(len(ngrams)))
    pairs = zip(tokens.tolist(), lengths.tolist(), strict=True)
    return {tuple(one[:length]): row for row, (one, length) in enumerate(pairs, 1)}


def longest(known, sequence: list[int], end: int) -> tuple:
    """The longest known n-gram whose last token is `sequence[end]`, or that token."""
    for first in range(max(0, end - 3), end):
        if tuple(sequence[first : end + 1]) in known:
            return tuple(sequence[first : end + 1])
    return (sequence[end],)


@pytest.mark.parametrize("place", ["device", "host"])
def test_ids_are_those_of_the_longest_ngram_and_go_on_after_a_cut(place):
    model = scone()
    stream, known = model.id_streams["frequent"], known_ngrams(model)
    index = build_index(random_ngrams(stream), stream)
    ngrams = ngrams_of(index, stream)
    found = {
        "device": lambda ids, before=None: stream_ids(stream, ids, before, index=index),
        "host": lambda ids, before=None: ngrams.match(ids, before).rows + 1,
    }[place]
    ids = np.asarray(random_ids(model, 5, 31))
    whole = np.asarray(found(ids))
    expected = [[known.get(longest(known, one, t), 0) for t in range(31)] for one in ids.tolist()]
    np.testing.assert_array_equal(whole, expected)
    assert 0.2 < (whole > 0).mean() < 1
    before = np.pad(ids[:, :2] + 1, ((0, 0), (1, 0)))
    rest = found(ids[:, 2:], before)
    assert rest.dtype == np.int32
    np.testing.assert_array_equal(rest, whole[:, 2:])


def test_an_index_gives_back_its_ngrams():
    model = scone()
    stream = model.id_streams["frequent"]
    ngrams = random_ngrams(stream)
    found = ngrams_of(build_index(ngrams, stream), stream)
    for mine, other in zip(found.tokens(np.arange(len(ngrams))), ngrams.tokens(
        np.arange(len(ngrams))), strict=True):  # fmt: skip
        np.testing.assert_array_equal(mine, other)
    unfilled = jax.tree.map(np.asarray, indices_of(init_params(model, jax.random.key(0))))
    empty = ngrams_of(unfilled["frequent"], stream)
    assert len(empty) == 0
    assert (empty.match(np.asarray(random_ids(model, 2, 9))).rows == -1).all()


def test_ngrams_in_one_bucket_are_told_apart():
    """All of them, in an index of one bucket's width; and others that are not there."""
    model = scone(streams="frequent=2:16:frequent")
    stream = model.id_streams["frequent"]
    index = build_index(random_ngrams(stream), stream)
    known, every = known_ngrams(model), np.indices((VOCAB, VOCAB)).reshape(2, -1).T
    found = frequent_ids(index, every.astype(np.int32), None, stream)[:, 1]
    assert found.tolist() == [known.get(tuple(pair), 0) for pair in every.tolist()]


def slow_embedding(params: dict, model: ModelConfig, ngram: tuple) -> np.ndarray:
    """A_f of one n-gram, alone: positions added, causal attention, no rotation."""
    own, eps = "scone/blocks", model.norm_eps
    x = np.array([params["embed"][token] for token in ngram])
    if "scone/enter" in params:
        x = x @ params["scone/enter"]
    x = x + params["scone/position"][: len(ngram)]
    for layer in range(params[f"{own}/ffn/up"].shape[0]):
        get = lambda name, layer=layer: params[f"{own}/{name}"][layer]
        normed = oracle.rms_norm(x, get("attention/norm"), eps)
        q, k, v = (np.einsum("td,dnh->tnh", normed, get(f"attention/{name}"))
                   for name in ("query", "key", "value"))  # fmt: skip
        mixed = np.zeros(q.shape)
        for t in range(len(ngram)):
            for head in range(q.shape[1]):
                of = head * k.shape[1] // q.shape[1]
                scores = k[: t + 1, of] @ q[t, head] / q.shape[2] ** 0.5
                mixed[t, head] = oracle.softmax(scores) @ v[: t + 1, of]
        x = x + np.einsum("tnh,nhd->td", mixed, get("attention/out"))
        normed = oracle.rms_norm(x, get("ffn/norm"), eps)
        weights = {"gate_DF": get("ffn/gate"), "up_DF": get("ffn/up"), "down_FD": get("ffn/down")}
        x = x + np.array([oracle.swiglu(one, **weights) for one in normed])
    if "scone/leave" in params:
        x = x @ params["scone/leave"]
    return oracle.rms_norm(x[-1], params["scone/norm"], eps)


def slow_input(params: dict, model: ModelConfig, ids, chosen) -> np.ndarray:
    """Return what the blocks read; `chosen(sequence, end)` is the n-gram of a token."""
    made: dict[tuple, np.ndarray] = {}
    for sequence in ids:
        for end in range(len(sequence)):
            ngram = chosen(sequence, end)
            if ngram not in made:
                one = len(ngram) == 1
                made[ngram] = (
                    params["embed"][ngram[0]] if one else slow_embedding(params, model, ngram)
                )
    return np.array([[made[chosen(one, end)] for end in range(len(one))] for one in ids])


def input_of(model: ModelConfig, params: Params, ids_BT: jax.Array, training=None):
    """(what the blocks read, counts)."""
    module = bind(model, params)
    reader = type("Reader", (), {"tables": {}, "in_layers": {}, "training": training})
    return module._input(ids_BT, None, reader, None)


@pytest.mark.parametrize("fields", [{}, NARROW], ids=["as the model", "narrower"])
def test_every_token_has_what_running_its_ngram_alone_would_give(fields):
    """Values and gradients, of all parameters and of the shared embedding."""
    model = scone(**{name.replace(".", "__"): value for name, value in fields.items()})
    params, ids = random_params(model), random_ids(model, 4, 16)
    known = known_ngrams(model)
    chosen = lambda sequence, end: longest(known, sequence, end)
    plain = {name: np.float64(value) for name, value in params.items()}
    found, counts = input_of(model, params, ids)
    expected = slow_input(plain, model, ids.tolist(), chosen)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert 0.3 < counts["ngram_matched"] < 1
    assert counts["ngram_shortened"] == 0

    weight = np.random.default_rng(1).standard_normal(expected.shape)
    trained = {k: v for k, v in params.items() if k == "embed" or k.startswith("scone/")}
    loss = lambda some: (input_of(model, params | some, ids, True)[0] * jnp.float32(weight)).sum()
    grads = jax.grad(loss)(trained)
    slow = lambda some: (slow_input(plain | some, model, ids.tolist(), chosen) * weight).sum()
    rng = np.random.default_rng(2)
    for name, value in trained.items():
        direction = {name: rng.standard_normal(value.shape)}
        expected = oracle.directional_derivative(slow, {name: plain[name]}, direction)
        assert float((grads[name] * direction[name]).sum()) == pytest.approx(
            expected, rel=2e-3, abs=2e-3
        ), name


def test_blocks_that_add_nothing_leave_a_norm_of_the_last_token():
    model = scone(arms__scone__zero_init=True)
    start = init_params(model, jax.random.key(0))
    params = start | {k: v for k, v in random_params(model).items() if k.startswith("ngrams/")}
    ids, known = random_ids(model, 4, 16), known_ngrams(model)

    def expected(sequence, end):
        size, own = len(longest(known, sequence, end)), params["embed"][sequence[end]]
        added = own + params["scone/position"][size - 1]
        return oracle.rms_norm(added, params["scone/norm"], model.norm_eps) if size > 1 else own

    found, _ = input_of(model, params, ids)
    for row, sequence in enumerate(ids.tolist()):
        for end in range(16):
            np.testing.assert_allclose(found[row, end], expected(sequence, end), atol=1e-5)


def test_nodes_are_the_prefixes_of_the_ngrams_each_once():
    model = scone()
    params, ids = random_params(model), random_ids(model, 4, 16)
    known = known_ngrams(model)
    found = {longest(known, one, end) for one in ids.tolist() for end in range(16)}
    prefixes = {ngram[:size] for ngram in found if len(ngram) > 1
                for size in range(1, len(ngram) + 1)}  # fmt: skip
    _, counts = input_of(model, params, ids)
    assert counts["ngram_nodes"] == pytest.approx(len(prefixes) / ids.size)
    tokens = sum(len(longest(known, one, end)) for one in ids.tolist() for end in range(16))
    assert len(prefixes) < 0.6 * tokens


def test_without_room_the_longest_ngrams_are_cut_and_counted():
    """A token has the longest prefix of others' n-grams that ends there and is among the nodes."""
    model = scone(arms__scone__room=0.5)
    params, ids = random_params(model), random_ids(model, 4, 16)
    known, sequences = known_ngrams(model), ids.tolist()
    whole = [[longest(known, one, end) for end in range(16)] for one in sequences]
    ends = collections.defaultdict(set)  # prefixes by the place where they end
    for row, one in enumerate(whole):
        for end, ngram in enumerate(one):
            for cut in range(len(ngram) if len(ngram) > 1 else 0):
                ends[row, end - cut].add(ngram[: len(ngram) - cut])
    number = lambda ngram: (len(ngram), ngram[0] if len(ngram) == 1 else known[ngram])
    nodes = set(sorted(set().union(*ends.values()), key=number)[:32])
    assert len(set().union(*ends.values())) > 32

    def chosen(row: int, end: int) -> tuple:
        here = ends[row, end] & nodes
        best = max(here, key=len, default=())
        return best if len(best) > 1 else (sequences[row][end],)

    params64 = {name: np.float64(value) for name, value in params.items()}
    found, counts = input_of(model, params, ids, training=True)
    for row in range(4):
        expected = slow_input(
            params64, model, [sequences[row]], lambda _, end, row=row: chosen(row, end)
        )
        np.testing.assert_allclose(found[row], expected[0], rtol=1e-4, atol=1e-4)
    cut = sum(len(chosen(row, end)) < len(whole[row][end]) for row in range(4) for end in range(16))
    assert counts["ngram_shortened"] == pytest.approx(cut / 64)
    assert cut > 5
    assert input_of(model, params, ids)[1]["ngram_shortened"] == 0  # not in training: room for all


def test_outside_of_training_more_nodes_than_room_are_made_all_the_same():
    """The few nodes that fit seldom hold all: then all are computed."""
    ids = random_ids(scone(), 32, 40)
    found = []
    for room in (0.01, 4.0):
        model = scone(arms__scone__room=room)
        states, counts = input_of(model, random_params(model), ids)
        assert counts["ngram_shortened"] == 0
        found.append(states)
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)
    cut = input_of(scone(arms__scone__room=0.01), random_params(scone()), ids, training=True)[1]
    assert cut["ngram_shortened"] > 0.3


def test_a_later_token_changes_no_earlier_state():
    model = scone()
    params, ids = random_params(model), random_ids(model, 3, 12)
    run = lambda ids: np.asarray(bind(model, params)(ids).hidden_BTD)
    whole = run(ids)
    for place in (4, 11):
        other = run(ids.at[:, place].add(1) % VOCAB)
        np.testing.assert_allclose(other[:, :place], whole[:, :place], rtol=1e-5, atol=1e-6)
        assert np.abs(other[:, place] - whole[:, place]).min() > 0


def test_token_by_token_as_at_once():
    model = scone()
    params, ids = random_params(model), random_ids(model, 3, 14)
    module = bind(model, params)
    whole = logits(module, module(ids).hidden_BTD)
    lengths = jnp.array([5, 3, 1])
    found, cache = prefill(module, ids[:, :5], lengths, capacity=32)
    for step in range(8):
        at = lengths + step
        for row in range(3):
            np.testing.assert_allclose(found[row], whole[row, at[row] - 1], rtol=1e-4, atol=1e-4)
        found, cache = decode(module, ids[jnp.arange(3), at], cache)


def test_flops_of_training_count_the_room_and_those_of_decoding_do_not():
    dense = flops.count(dataclasses.replace(DENSE, vocab_size=VOCAB), seq_len=16)
    found = flops.count(scone(), seq_len=16)
    entries = 2 * (12 * 6 * (4 + 2 + 2 + 4) + 3 * 12 * 17)  # of two blocks
    assert found.forward_flops == dense.forward_flops
    assert found.train_flops - dense.train_flops == 3 * 4 * (2 * entries + 4 * 4 * 4 * 6 * 2)
    most = flops.count(scone(arms__scone__room=400.0), seq_len=16)
    assert most.train_flops == found.train_flops  # a token has at most four nodes
    norms = 12 * (2 * 2 + 1)
    assert found.backbone - dense.backbone == entries + norms + 4 * 12
    assert found.active == dense.active
    assert found.tables == 0


@pytest.mark.parametrize(("fields", "reason"), [
    ({"streams": "frequent=2:9"}, "no stream of frequent n-grams"),
    ({"streams": "other=2:9:frequent"}, "names 'frequent', but the id streams are"),
    ({"streams": "frequent=1:9:frequent"}, "order of frequent is 1"),
    ({"streams": "frequent=3:9:frequent, more=3:9:frequent", "arms.names": "scone,ngram",
      "arms.ngram.streams": "more"}, "frequent and more as frequent"),
    ({"streams": "frequent=3:600000000:frequent"}, "at most 500000000 frequent n-grams"),
    ({"streams": ""}, "Declare it: model.streams=frequent=5:ROWS:frequent"),
    ({"arms.scone.model_dim": 10}, "Of A_f, by model.arms.scone: .* is not a multiple"),
    ({"arms.scone.room": 0.0}, "arms.scone.room is 0.0"),
    ({"arms.scone.kind": "tables"}, "arms.scone.kind"),
])  # fmt: skip
def test_impossible_options_are_refused(fields, reason):
    with pytest.raises(ConfigError, match=reason):
        scone(**{name.replace(".", "__"): value for name, value in fields.items()})
