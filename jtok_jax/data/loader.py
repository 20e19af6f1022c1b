# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Batches as a pure function of (seed, step), read ahead by Grain."""

import math
import pathlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from jtok_jax.config import Config
from jtok_jax.data import manifest, tokenizer
from jtok_jax.data.windows import Windows, allow_open_files
from jtok_jax.errors import DataError

LOSSLESS = 0.001  # of a text may be lost before its bits a byte mean nothing
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
    """A corpus written by jtok_jax.prepare.

    tokenizer: its file; None: the ids came without one. end_id: stands between documents.
    fingerprint: changes whenever the same step would give other tokens. valid_bytes: UTF-8 bytes of
    the held-out documents; of a part by its share of tokens; 0: not known, as of token
    ids, or of a tokenizer that loses text.
    """

    def __init__(self, config: Config):
        if not config.data.path:
            raise DataError(
                "data.path is empty. Prepare a corpus (python -m jtok_jax.prepare --help) and "
                "pass --config.data.path=FOLDER, or use --config.data.source=synthetic."
            )
        folder = pathlib.Path(config.data.path)
        self.manifest = manifest.read_manifest(folder)
        self.end_id = self.manifest.end_id
        self.tokenizer = folder / tokenizer.FILE_NAME if self.manifest.tokenizer_sha256 else None
        self._vocab_size = config.model.vocab_size
        self._check_tokenizer(folder)
        manifest.verify_shards(folder, self.manifest, hashes=config.data.verify == "hash")
        allow_open_files(len(self.manifest.train.shards) + len(self.manifest.valid.shards))
        seq_len = config.train.seq_len
        self._train = Windows(folder, self.manifest, "train", seq_len=seq_len)
        self._valid = Windows(folder, self.manifest, "valid", seq_len=seq_len)
        self._batch_size, self._eval_size = config.train.batch_size, config.evaluation.batch_size
        order = grain.MapDataset.range(len(self._train)).seed(config.train.seed)
        self._order = order.shuffle().repeat()
        self.fingerprint = self.manifest.fingerprint()
        targets, count = self._valid.split.targets, math.ceil(self._valid.split.targets / seq_len)
        used = min(config.evaluation.max_sequences or count, count)
        self._evaluated = np.arange(used) * count // used  # sequences of the held-out set
        share = np.minimum(targets - self._evaluated * seq_len, seq_len).sum() / targets
        lost = manifest.lost_share(self.manifest.text.get("valid", {})) > LOSSLESS
        self.valid_bytes = 0 if lost else self.manifest.valid.text_bytes * share

    def sequences(self, step: int, rows: Rows = None) -> np.ndarray:
        """Return int32 ids [rows, seq_len + 1] of the batch of `step` (from 1)."""
        first = (step - 1) * self._batch_size
        indices = [int(self._order[first + row]) for row in _all(rows, self._batch_size)]
        return np.stack([self._checked(self._train, index) for index in indices])

    def valid_batches(self, rows: Rows = None) -> Iterator[EvalBatch]:
        """Yield the held-out set, or evaluation.max_sequences of it, evaluation.batch_size each."""
        # The windows of the split follow each other: sequence i predicts targets i*T to (i+1)*T-1.
        targets, count = self._valid.split.targets, len(self._evaluated)
        for first in range(0, count, self._eval_size):
            places = first + _all(rows, self._eval_size)
            indices = self._evaluated[np.minimum(places, count - 1)]
            ids = [self._checked(self._valid, int(index)) for index in indices]
            starts = np.where(places < count, indices * self._valid.seq_len, targets)
            real = starts[:, None] + np.arange(self._valid.seq_len) < targets
            yield EvalBatch(*make_batch(np.stack(ids)), real.astype(np.float32))

    def _checked(self, windows: Windows, index: int) -> np.ndarray:
        ids = windows[index]
        check_ids(ids, self._vocab_size, windows.locate(index))
        return ids

    def _check_tokenizer(self, folder: pathlib.Path) -> None:
        found = self.manifest
        if found.vocab_size > self._vocab_size:
            raise DataError(
                f"The tokenizer of {folder} has {found.vocab_size} entries, model.vocab_size is "
                f"{self._vocab_size}: ids up to {found.vocab_size - 1} would index past the "
                f"tables. Pass --config.model.vocab_size={found.vocab_size} or more."
            )
        path = folder / tokenizer.FILE_NAME
        if not found.tokenizer_sha256:  # token ids of --vocab_size
            return
        if not path.is_file() or manifest.file_sha256(path) != found.tokenizer_sha256:
            raise DataError(f"{path} is not the tokenizer the shards were written with.")


class SyntheticSource:
    """Random ids with a Zipf-like (log-uniform) frequency, for benchmarks; one byte a token."""

    VALID_BATCHES = 4
    tokenizer = end_id = None

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
