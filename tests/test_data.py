# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""From a prepared corpus to batches: their order, the held-out set, hashes, rows of a process."""

import dataclasses
import pathlib

import numpy as np
import pytest
from small import DENSE

from jtok_jax.config import Config, DataConfig, EvaluationConfig, TrainConfig
from jtok_jax.data.loader import make_batch, open_source, train_batches
from jtok_jax.data.tokenizer import load_tokenizer
from jtok_jax.data.windows import Windows
from jtok_jax.training.step import batch_hash

replace = dataclasses.replace


def run_config(folder: pathlib.Path, **changes) -> Config:
    return Config(
        model=replace(DENSE, vocab_size=300),
        train=TrainConfig(**{"batch_size": 4, "seq_len": 16, "steps": 30} | changes),
        data=DataConfig(path=str(folder)),
        evaluation=EvaluationConfig(batch_size=3),
    )


def hexes(batch) -> str:
    """Hash of a batch, as metrics.jsonl has it."""
    return bytes(batch_hash(batch.ids_BT, batch.targets_BT)).hex()


def test_batches_are_a_pure_function_of_seed_and_step(corpus):
    config = run_config(corpus)
    straight = list(train_batches(open_source(config), config, first_step=1))
    assert len(straight) == 30
    for threads, first in ((1, 7), (3, 30)):
        data = replace(config.data, read_threads=threads, prefetch=threads)
        other = replace(config, data=data)
        resumed = list(train_batches(open_source(other), other, first_step=first))
        assert [hexes(b) for b in resumed] == [hexes(b) for b in straight[first - 1 :]]
    assert len({hexes(batch) for batch in straight}) == 30
    reseeded = replace(config, train=replace(config.train, seed=1))
    assert open_source(reseeded).sequences(1).tolist() != straight[0].ids_BT.tolist()
    np.testing.assert_array_equal(straight[0].ids_BT[:, 1:], straight[0].targets_BT[:, :-1])


def test_an_epoch_reads_every_sequence_once(corpus):
    config = run_config(corpus, batch_size=1)
    source = open_source(config)
    windows = Windows(corpus, source.manifest, "train", seq_len=16)
    wanted = sorted(windows[index].tobytes() for index in range(len(windows)))
    epochs = [
        [
            source.sequences(epoch * len(windows) + step + 1).tobytes()
            for step in range(len(windows))
        ]
        for epoch in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == wanted
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("source", ["prepared", "synthetic"])
def test_validation_weighs_every_target_once(corpus, source):
    config = run_config(corpus)
    config = replace(config, data=replace(config.data, source=source))
    opened = open_source(config)
    batches = list(opened.valid_batches())
    assert {batch.ids_BT.shape for batch in batches} == {(3, 16)}
    total = sum(batch.weights_BT.sum() for batch in batches)
    if source == "prepared":
        assert total == opened.manifest.valid.targets
        whole = Windows(corpus, opened.manifest, "valid", seq_len=64)
        stream = np.concatenate([whole[index][1:] for index in range(len(whole))])
        kept = np.concatenate([b.targets_BT[b.weights_BT > 0] for b in batches])
        np.testing.assert_array_equal(kept, stream[: len(kept)])
    else:
        assert total == opened.valid_bytes == 4 * 3 * 16


@pytest.mark.parametrize("most", [1, 4, 10_000])
def test_validation_on_a_part_takes_sequences_from_all_over_the_set(corpus, most):
    config = run_config(corpus)
    some = replace(config, evaluation=replace(config.evaluation, max_sequences=most))
    whole, part = open_source(config), open_source(some)
    real = lambda source: [
        (ids, targets[weights > 0])
        for batch in source.valid_batches()
        for ids, targets, weights in zip(*batch, strict=True)
        if weights.any()
    ]
    every, found = real(whole), real(part)
    assert len(every) > 8
    count = min(most, len(every))
    wanted = [every[index * len(every) // count] for index in range(count)]
    for (ids, targets), (wanted_ids, wanted_targets) in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ids, wanted_ids)
        np.testing.assert_array_equal(targets, wanted_targets)
    assert whole.valid_bytes == whole.manifest.valid.text_bytes
    encoder, end_id = load_tokenizer(corpus / "tokenizer.json"), whole.end_id
    ids = [targets[targets != end_id].tolist() for _, targets in found]
    spelled = sum(len(encoder.id_to_token(one)) for part in ids for one in part)  # a byte a letter
    assert abs(part.valid_bytes - spelled) <= 4 * len(found)


def test_any_token_and_any_order_change_the_hash():
    ids = np.arange(20, dtype=np.int32).reshape(2, 10)
    last, first = ids.copy(), ids.copy()
    last[1, 9] += 1
    first[0, 0] += 1
    known = {hexes(make_batch(x)) for x in (ids, last, first, ids[::-1], ids.reshape(4, 5))}
    assert len(known) == 5
    assert hexes(make_batch(ids.copy())) in known


@pytest.mark.parametrize("source", ["prepared", "synthetic"])
def test_some_rows_are_those_of_the_whole_batch(corpus, source):
    config = run_config(corpus)
    opened = open_source(replace(config, data=replace(config.data, source=source)))
    for rows in ([1], [0, 2]):
        np.testing.assert_array_equal(opened.sequences(3, rows), opened.sequences(3)[rows])
        for part, whole in zip(opened.valid_batches(rows), opened.valid_batches(), strict=True):
            for some, every in zip(part, whole, strict=True):
                np.testing.assert_array_equal(some, every[rows])
