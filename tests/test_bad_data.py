# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Prepared corpora that must not be trained on: damaged, foreign, or of another length."""

import dataclasses
import pathlib
import shutil

import pytest
from small import DENSE, small_config, small_recipe, write_documents
from test_data import run_config

from jtok_jax.data import manifest
from jtok_jax.data.loader import open_source, train_batches
from jtok_jax.errors import CheckpointError, DataError
from jtok_jax.prepare import prepare
from jtok_jax.training.resume import claim_workdir

replace = dataclasses.replace


def copy_of(corpus_folder: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(corpus_folder, tmp_path / "copy")


def test_token_ids_outside_the_vocabulary_are_refused_with_their_place(tmp_path, corpus):
    folder = copy_of(corpus, tmp_path)
    found = manifest.read_manifest(folder)
    # A manifest that claims a small vocabulary: the ids themselves are checked all the same.
    manifest.write_manifest(folder, replace(found, vocab_size=20))
    config = run_config(folder)
    small = replace(config, model=replace(config.model, vocab_size=200))
    source = open_source(small)
    message = r"Token id 2\d\d outside \[0, 200\) in train-00000.array_record record \d+ from"
    with pytest.raises(DataError, match=message):
        [source.sequences(step) for step in range(1, 31)]
    with pytest.raises(DataError, match="outside"):
        list(train_batches(source, small, first_step=1))


def test_tokenizer_larger_than_the_vocabulary_is_refused(corpus):
    config = run_config(corpus)
    with pytest.raises(DataError, match=r"has 300 entries, model\.vocab_size is 299"):
        open_source(replace(config, model=replace(config.model, vocab_size=299)))


def _append_to_tokenizer(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text() + " ")


def _truncate(folder):
    path = next(folder.glob("train*"))
    path.write_bytes(path.read_bytes()[:-100])


def _flip(folder):
    path = next(folder.glob("train*"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _lead_outside(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"train-', '"../train-'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_append_to_tokenizer, "not the tokenizer the shards were written with"),
        (_truncate, r"train-00000.array_record ends at byte [\d,]+, the manifest says"),
        (_flip, "does not have the SHA-256"),
        (lambda folder: next(folder.glob("valid*")).unlink(), "is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "holds no prepared corpus"),
        (lambda folder: (folder / "manifest.json").write_text("{}"), "is damaged"),
        (_lead_outside, "leaves the folder"),
    ],
)
def test_damaged_corpora_are_refused(tmp_path, corpus, damage, message):
    folder = copy_of(corpus, tmp_path)
    damage(folder)
    config = run_config(folder)
    config = replace(config, data=replace(config.data, verify="hash"))
    with pytest.raises(DataError, match=message):
        open_source(config)


def test_with_sizes_alone_damage_is_still_found_when_read(tmp_path, corpus):
    folder = copy_of(corpus, tmp_path)
    _flip(folder)
    config = run_config(folder)
    with pytest.raises(DataError, match=r"A shard in .* is damaged"):
        [open_source(config).sequences(step) for step in range(1, 31)]


def test_length_that_does_not_divide_and_missing_path_are_refused(corpus):
    with pytest.raises(DataError, match="windows of 64"):
        open_source(run_config(corpus, seq_len=48))
    with pytest.raises(DataError, match=r"data.path is empty"):
        open_source(run_config(""))
    with pytest.raises(DataError, match=r"manifest.json is a file; expected the folder"):
        open_source(run_config(corpus / "manifest.json"))


def test_a_manifest_that_is_not_text_is_refused(tmp_path, corpus):
    folder = copy_of(corpus, tmp_path)
    (folder / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="is damaged"):
        open_source(run_config(folder))


def test_what_cannot_be_written_is_told_and_leaves_nothing(tmp_path):
    write_documents(tmp_path)
    recipe, taken = small_recipe(tmp_path), tmp_path / "000.txt"
    before = taken.read_text()
    for output in (taken, taken / "below"):
        with pytest.raises(DataError, match=r"Not a directory: .*000.txt.* Nothing was written"):
            prepare(recipe, output)
    with pytest.raises(DataError, match="no window of"):
        prepare(replace(recipe, valid_fraction=0.0), tmp_path / "out")
    with pytest.raises(DataError, match="ids are 32-bit"):
        replace(recipe, vocab_size=1 << 31)
    assert taken.read_text() == before
    assert not [path for path in tmp_path.rglob("*") if path.is_dir()]


def test_a_damaged_configuration_of_a_run_is_told(tmp_path):
    config = small_config(DENSE)
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    for content in (b"{", b"\xff"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"config.json is damaged .* delete this file"):
            claim_workdir(tmp_path, config)
