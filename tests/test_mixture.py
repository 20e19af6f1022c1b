# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Several corpora in one run, mixed by weights."""

import dataclasses
import math
import shutil

import numpy as np
import pytest
from pythons import oldest
from small import small_recipe, write_documents
from test_data import hexes, run_config

from jtok_jax.data import manifest
from jtok_jax.data.loader import Mixture, open_source, train_batches
from jtok_jax.data.windows import Windows
from jtok_jax.errors import ConfigError, DataError
from jtok_jax.prepare import prepare

replace = dataclasses.replace
pytestmark = oldest


@pytest.fixture(scope="module")
def other(corpus, tmp_path_factory):
    """Fewer documents than `corpus` has, cut by its tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    (folder / "text").mkdir()
    write_documents(folder / "text", seed=1, count=25)
    return _prepare(folder, corpus)


def _prepare(folder, corpus, name="prepared", **changes):
    recipe = small_recipe(folder / "text")
    changes |= {"vocab_size": 0, "tokenizer": str(corpus / "tokenizer.json")}
    prepare(replace(recipe, **changes), folder / name)
    return folder / name


def mixed_config(*parts, **changes):
    return run_config(",".join(f"{folder}:{weight}" for folder, weight in parts), **changes)


def test_shares_are_exact_and_every_corpus_keeps_its_own_order(corpus, other):
    config = mixed_config((corpus, 0.7), (other, 0.3), batch_size=10)
    source, steps = open_source(config), range(1, 301)
    rows = np.concatenate([source.sequences(step) for step in steps])
    place = {}
    for name, folder in (("a", corpus), ("b", other)):
        alone = open_source(run_config(folder, batch_size=10))
        windows = Windows(folder, alone.manifest, "train", seq_len=16)
        place |= {windows[index].tobytes(): name for index in range(len(windows))}
    found = np.array([place[row.tobytes()] for row in rows])
    for name, folder, share in (("a", corpus, 7), ("b", other, 3)):
        assert ((found == name).reshape(300, 10).sum(1) == share).all()  # of every batch
        alone = open_source(run_config(folder, batch_size=share))
        wanted = np.concatenate([alone.sequences(step) for step in steps])
        np.testing.assert_array_equal(rows[found == name], wanted)


@pytest.mark.parametrize("parts", [[7, 3], [62, 38], [1000, 1009], [1, 2, 5], [1]])
def test_shares_stay_exact_for_ever(parts):
    whole = sum(parts)
    mixture = Mixture([1000] * len(parts), parts, seed=0)
    for block in (0, 1, 999, 10**9):
        found = [mixture[block * whole + place][0] for place in range(whole)]
        assert np.bincount(found).tolist() == parts
    counted = np.cumsum(np.eye(len(parts))[found], axis=0)  # never far from even
    even = np.arange(1, whole + 1)[:, None] * np.array(parts) / whole
    assert np.abs(counted - even).max() <= len(parts) / 2


def test_a_mixture_goes_on_at_any_step(corpus, other):
    config = mixed_config((corpus, 2), (other, 1))
    straight = list(train_batches(open_source(config), config, first_step=1))
    resumed = list(train_batches(open_source(config), config, first_step=18))
    assert [hexes(b) for b in resumed] == [hexes(b) for b in straight[17:]]


def test_all_held_out_sets_are_validated_once(corpus, other):
    source = open_source(mixed_config((corpus, 1), (other, 9)))
    both = [open_source(run_config(folder)) for folder in (corpus, other)]
    read = lambda one: np.concatenate(
        [batch.targets_BT[batch.weights_BT > 0] for batch in one.valid_batches()]
    )
    np.testing.assert_array_equal(read(source), np.concatenate([*map(read, both)]))
    assert math.isclose(source.valid_bytes, sum(one.valid_bytes for one in both))


def test_the_fingerprint_is_of_shares_and_contents(corpus, other):
    print_of = lambda *parts: open_source(mixed_config(*parts)).fingerprint
    base = print_of((corpus, 0.7), (other, 0.3))
    assert base == print_of((corpus, 7), (other, 3)) == print_of((corpus, "0.70"), (other, "0.3"))
    assert base != print_of((corpus, 0.6), (other, 0.4))
    assert base != print_of((other, 0.7), (corpus, 0.3))
    alone = open_source(run_config(corpus)).fingerprint
    assert alone == manifest.read_manifest(corpus).fingerprint()


def test_documents_held_out_by_different_rules_are_told(corpus, other, tmp_path):
    assert not open_source(mixed_config((corpus, 1), (other, 1))).note
    (tmp_path / "text").mkdir()
    write_documents(tmp_path / "text", seed=2, count=30)
    more = _prepare(tmp_path, corpus, valid_fraction=0.4)
    assert "may train in another" in open_source(mixed_config((corpus, 1), (more, 1))).note


@pytest.mark.parametrize(
    "weights", ["{}:1,{}", "{}:1,{}:0", "{}:1,{}:-2", "{}:1,{}:inf", "{},{}", "{0}:1,{0}:2"]
)
def test_weights_that_are_none_are_refused(corpus, other, weights):
    with pytest.raises(ConfigError, match=r"expected a folder, or several with weights above 0"):
        open_source(run_config(weights.format(corpus, other)))


def test_a_share_that_would_never_be_read_is_refused(corpus, other):
    with pytest.raises(ConfigError, match=r"a mixture of 1,000,000,001 parts, of at most 100,000"):
        open_source(mixed_config((corpus, 1), (other, 1e-9)))


def test_a_comma_in_the_name_of_a_folder_is_one(corpus, tmp_path):
    folder = shutil.copytree(corpus, tmp_path / "a, b" / "c")
    assert (
        open_source(run_config(folder)).fingerprint == open_source(run_config(corpus)).fingerprint
    )
    assert manifest.absolute_path(str(folder)) == str(folder)


def test_ids_of_another_vocabulary_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.tile(np.arange(60), 90).astype(np.uint16))
    for size in (66, 70):
        recipe = small_recipe(tmp_path, ids="uint16", end_id=65, vocab_size=size)
        prepare(replace(recipe, input=str(tmp_path / "a.npy")), tmp_path / str(size))
    with pytest.raises(DataError, match=r"another tokenizer"):
        open_source(mixed_config((tmp_path / "66", 1), (tmp_path / "70", 1)))


def test_another_tokenizer_is_refused(corpus, tmp_path):
    (tmp_path / "text").mkdir()
    write_documents(tmp_path / "text", seed=3)
    prepare(small_recipe(tmp_path / "text"), tmp_path / "own")
    with pytest.raises(DataError, match=r"another tokenizer.*--tokenizer="):
        open_source(mixed_config((corpus, 1), (tmp_path / "own", 1)))
