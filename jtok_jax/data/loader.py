# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Batches as a pure function of (seed, step), read ahead by Grain."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from jtok_jax.config import Config
from jtok_jax.data import manifest, prepared, tokenizer
from jtok_jax.data.windows import Windows, allow_open_files
from jtok_jax.errors import DataError

Rows = Sequence[int] | None  # sequences of a batch that are wanted; None: all


class Batch(NamedTuple):
    """Sequences of one step, or some of them; targets are the ids shifted by one."""

    ids_BT: np.ndarray  # int32
    targets_BT: np.ndarray  # int32


class EvalBatch(NamedTuple):
    """Sequences of the held-out set; weights are 0 on padding."""

    ids_BT: np.ndarray
    targets_BT: np.ndarray
    weights_BT: np.ndarray  # float32, 0 or 1


def make_batch(sequences: np.ndarray) -> Batch:
    """Return the batch of `sequences` [B, T + 1]."""
    return Batch(sequences[:, :-1], sequences[:, 1:])


def check_ids(ids: np.ndarray, vocab_size: int, where: str) -> None:
    """Refuse ids outside [0, vocab_size) before they reach a table."""
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        position = int(np.argmax((ids < 0) | (ids >= vocab_size)))
        raise DataError(
            f"Token id {int(ids.flat[position])} outside [0, {vocab_size}) in {where}, "
            f"place {position}. The data does not belong to this vocabulary; prepare it again."
        )


def check_unique(found: int, config: Config, step: int) -> None:
    """Refuse a step with more different ids than there is room for row gradients: it was void."""
    read = config.model.streams_read.values()
    if any("token" in names for names in read) and found > config.unique_rows("token"):
        raise DataError(
            f"Step {step} uses {found} different ids, train.max_unique_ids is "
            f"{config.train.max_unique_ids}. Pass "
            f"--config.train.max_unique_ids={found} or more, or 0 for no limit; the run goes on "
            "from its last checkpoint with another value."
        )


class PreparedSource:
    """Corpora written by jtok_jax.prepare, mixed by the weights of data.path.

    tokenizer: its file; None: the ids came without one. end_id: stands between documents.
    fingerprint: changes whenever the same step would give other tokens. valid_bytes: UTF-8 bytes of
    the held-out documents that are evaluated; of a part, to a few bytes a sequence, whose ends
    may cut a letter; 0: not known, as of token ids, or of a tokenizer that loses text. note: what a
    user should know of the mixture. offset: sequences by which the data is further on than steps of
    this batch_size.
    """

    offset = 0

    def __init__(self, config: Config):
        if not config.data.path:
            raise DataError(
                "data.path is empty. Prepare a corpus (python -m jtok_jax.prepare --help) and "
                "pass --config.data.path=FOLDER, or use --config.data.source=synthetic."
            )
        parts = manifest.parse_mixture(config.data.path)
        folders, counts = [folder for folder, _ in parts], [count for _, count in parts]
        found = [prepared.open_corpus(folder, config) for folder in folders]
        self.manifest = found[0]
        self.end_id = self.manifest.end_id
        self.tokenizer = folders[0] / tokenizer.FILE_NAME if found[0].tokenizer_sha256 else None
        self.note = prepared.compare(found, folders)
        prepared.check_vocabulary(found[0], folders[0], config.model.vocab_size)
        self._vocab_size, self._seq_len = config.model.vocab_size, config.train.seq_len
        allow_open_files(sum(len(one.train.shards) + len(one.valid.shards) for one in found))
        places = list(zip(folders, found, strict=True))
        self._train, self._valid = (
            [Windows(*place, split, seq_len=self._seq_len) for place in places]
            for split in ("train", "valid")
        )
        self._batch_size, self._eval_size = config.train.batch_size, config.evaluation.batch_size
        self._order = Mixture([len(one) for one in self._train], counts, config.train.seed)
        self.fingerprint = prepared.fingerprint(found, counts)
        self._choose_evaluated(config.evaluation.max_sequences)
        self.valid_bytes = self._text_bytes([prepared.text_bytes(one) for one in found])

    def _choose_evaluated(self, most: int) -> None:
        """Spread the sequences that are evaluated over the held-out sets, one after another."""
        totals = [windows.split.targets for windows in self._valid]
        counts = [math.ceil(targets / self._seq_len) for targets in totals]
        used = min(most or sum(counts), sum(counts))
        chosen = np.arange(used) * sum(counts) // used
        self._corpus = np.repeat(np.arange(len(counts)), counts)[chosen]
        self._index = np.concatenate([np.arange(count) for count in counts])[chosen]
        # Windows of a split follow each other: sequence i predicts targets i*T to (i+1)*T-1.
        left = np.array(totals)[self._corpus] - self._index * self._seq_len
        self._targets = np.minimum(left, self._seq_len)

    def _text_bytes(self, whole: list[int]) -> int:
        """Return the UTF-8 bytes of what is evaluated, by those of the whole sets; 0: not known."""
        if not all(whole):
            return 0
        if self._targets.sum() == sum(windows.split.targets for windows in self._valid):
            return sum(whole)
        decode, found = tokenizer.load_tokenizer(self.tokenizer).decode, 0
        for corpus, index, targets in zip(self._corpus, self._index, self._targets, strict=True):
            ids = self._valid[corpus][int(index)][1 : targets + 1]
            for document in np.split(ids, np.flatnonzero(ids == self.end_id)):  # before its end
                text = decode(document[document != self.end_id].tolist())
                found += len(text.encode())
        return found

    def sequences(self, step: int, rows: Rows = None) -> np.ndarray:
        """Return int32 ids [rows, seq_len + 1] of the batch of `step` (from 1)."""
        first = (step - 1) * self._batch_size + self.offset
        chosen = [self._order[first + int(row)] for row in _all(rows, self._batch_size)]
        return np.stack([self._checked(self._train[corpus], index) for corpus, index in chosen])

    def valid_batches(self, rows: Rows = None) -> Iterator[EvalBatch]:
        """Yield the held-out sets, or evaluation.max_sequences, evaluation.batch_size each."""
        count = len(self._index)
        for first in range(0, count, self._eval_size):
            places = first + _all(rows, self._eval_size)
            there = np.minimum(places, count - 1)
            pairs = zip(self._corpus[there], self._index[there], strict=True)
            ids = [self._checked(self._valid[corpus], int(index)) for corpus, index in pairs]
            targets = np.where(places < count, self._targets[there], 0)
            real = np.arange(self._seq_len) < targets[:, None]
            yield EvalBatch(*make_batch(np.stack(ids)), real.astype(np.float32))

    def _checked(self, windows: Windows, index: int) -> np.ndarray:
        ids = windows[index]
        check_ids(ids, self._vocab_size, windows.locate(index))
        return ids


class Mixture:
    """(corpus, sequence) by place, without end; each corpus in an order of its own.

    Of every sum(parts) places in a row, from a multiple on, each corpus has exactly its parts,
    spread evenly.
    """

    def __init__(self, sizes: list[int], parts: list[int], seed: int):
        self._orders = [
            grain.MapDataset.range(size).seed(seed).shuffle().repeat() for size in sizes
        ]
        self._parts, corpora = np.array(parts), np.repeat(np.arange(len(parts)), parts)
        own = np.concatenate([np.arange(count) for count in parts])  # places of a corpus
        chosen = np.argsort((own + 0.5) / self._parts[corpora], kind="stable")
        self._corpora, self._own = corpora[chosen], own[chosen]

    def __getitem__(self, place: int) -> tuple[int, int]:
        block, place = divmod(place, len(self._corpora))
        corpus = int(self._corpora[place])
        own = block * int(self._parts[corpus]) + int(self._own[place])
        return corpus, int(self._orders[corpus][own])


class SyntheticSource:
    """Random ids with a Zipf-like (log-uniform) frequency, for benchmarks; one byte a token."""

    VALID_BATCHES = 4
    tokenizer = end_id = None
    note, offset = "", 0  # a run of these keeps its batch size

    def __init__(self, config: Config):
        self._config = config
        shape = (config.train.batch_size, config.train.seq_len, config.model.vocab_size)
        self.fingerprint = {"synthetic": f"seed {config.train.seed}, shape {shape}"}
        rows = self.VALID_BATCHES * config.evaluation.batch_size
        self.valid_bytes = rows * config.train.seq_len

    def sequences(self, step: int, rows: Rows = None) -> np.ndarray:
        """Return int32 ids [rows, seq_len + 1] of the batch of `step`."""
        key = self._config.train.seed, step
        return self._draw(key, self._config.train.batch_size, rows)

    def valid_batches(self, rows: Rows = None) -> Iterator[EvalBatch]:
        """Yield a held-out set that is always the same."""
        for index in range(self.VALID_BATCHES):
            key = self._config.train.seed, 0, index
            ids = self._draw(key, self._config.evaluation.batch_size, rows)
            batch = make_batch(ids)
            yield EvalBatch(*batch, np.ones(batch.targets_BT.shape, np.float32))

    def _draw(self, key: tuple[int, ...], size: int, rows: Rows) -> np.ndarray:
        uniform = np.random.default_rng(key).random((size, self._config.train.seq_len + 1))
        uniform, vocab_size = uniform[_all(rows, size)], self._config.model.vocab_size
        return np.minimum(np.exp(uniform * np.log(vocab_size + 1)) - 1, vocab_size - 1).astype(
            np.int32
        )


def _all(rows: Rows, size: int) -> np.ndarray:
    return np.arange(size) if rows is None else np.asarray(rows)


Source = PreparedSource | SyntheticSource


def open_source(config: Config) -> Source:
    """Return the data of a run, checked. Raises DataError where it cannot be used."""
    return PreparedSource(config) if config.data.source == "prepared" else SyntheticSource(config)


def train_batches(
    source: Source, config: Config, rows: Rows = None, *, first_step: int
) -> Iterator[Batch]:
    """Return sequences `rows` of the batches from `first_step` on, read ahead by threads.

    The position is the step alone: nothing about it needs saving.
    """
    steps = grain.MapDataset.range(first_step, config.train.steps + 1)
    batches = steps.map(lambda step: make_batch(source.sequences(int(step), rows)))
    options = grain.ReadOptions(
        num_threads=config.data.read_threads, prefetch_buffer_size=config.data.prefetch
    )
    return iter(batches.to_iter_dataset(options))
