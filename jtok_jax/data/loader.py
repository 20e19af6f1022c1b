# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Batches as a pure function of (seed, step), read ahead by Grain."""

import hashlib
import math
import pathlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import grain
import numpy as np

from jtok_jax.config import Config
from jtok_jax.data import manifest, tokenizer
from jtok_jax.data.windows import Windows
from jtok_jax.errors import DataError


class Batch(NamedTuple):
    """Sequences of one step; targets are the ids shifted by one."""

    ids_BT: np.ndarray  # int32
    targets_BT: np.ndarray  # int32
    hash: str
    unique_ids: int  # different ids among ids_BT


class EvalBatch(NamedTuple):
    """Sequences of the held-out set; weights are 0 on padding."""

    ids_BT: np.ndarray
    targets_BT: np.ndarray
    weights_BT: np.ndarray  # float32, 0 or 1


class Source(Protocol):
    """Where batches come from."""

    fingerprint: dict[str, str]  # changes whenever the same step would give other tokens
    valid_bytes: int  # UTF-8 bytes of the held-out documents

    def sequences(self, step: int) -> np.ndarray:
        """int32 ids [batch_size, seq_len + 1] of `step` (from 1)."""

    def valid_batches(self) -> Iterator[EvalBatch]:
        """The whole held-out set once."""


def open_source(config: Config) -> Source:
    """The data of a run, checked. Raises DataError where it cannot be used."""
    return PreparedSource(config) if config.data.source == "prepared" else SyntheticSource(config)


def make_batch(sequences: np.ndarray) -> Batch:
    """Batch of `sequences` [B, T + 1] with a hash of its contents."""
    digest = hashlib.sha256(np.ascontiguousarray(sequences)).hexdigest()[:16]
    ids = sequences[:, :-1]
    return Batch(ids, sequences[:, 1:], digest, np.unique(ids).size)


def train_batches(source: Source, config: Config, *, first_step: int) -> Iterator[Batch]:
    """Batches of first_step, first_step + 1, ..., prepared in reader threads.

    The position is the step alone: nothing about it needs saving.
    """
    steps = grain.MapDataset.range(first_step, config.train.steps + 1)

    def batch(step: int) -> Batch:
        made = make_batch(source.sequences(step))
        check_unique(made.unique_ids, config, step)
        return made

    batches = steps.map(lambda step: batch(int(step)))
    options = grain.ReadOptions(
        num_threads=config.data.read_threads, prefetch_buffer_size=config.data.prefetch
    )
    return iter(batches.to_iter_dataset(options))


def check_ids(ids: np.ndarray, vocab_size: int, where: str) -> None:
    """Refuse ids outside [0, vocab_size) before they reach a table."""
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        position = int(np.argmax((ids < 0) | (ids >= vocab_size)))
        raise DataError(
            f"Token id {int(ids.flat[position])} outside [0, {vocab_size}) in {where}, "
            f"place {position}. The data does not belong to this vocabulary; prepare it again."
        )


def check_unique(found: int, config: Config, step: int) -> None:
    """Refuse a batch with more different ids than there is room for row gradients."""
    if config.model.tables_shape is not None and found > config.rows_per_step:
        raise DataError(
            f"Step {step} uses {found} different ids, train.max_unique_ids is "
            f"{config.train.max_unique_ids}. Pass --config.train.max_unique_ids={found} or more, "
            "or 0 for no limit; a run goes on from its last checkpoint with another value."
        )


class PreparedSource:
    """A corpus written by jtok_jax.prepare."""

    def __init__(self, config: Config):
        if not config.data.path:
            raise DataError(
                "data.path is empty. Prepare a corpus (python -m jtok_jax.prepare --help) and "
                "pass --config.data.path=FOLDER, or use --config.data.source=synthetic."
            )
        folder = pathlib.Path(config.data.path)
        self.manifest = manifest.read_manifest(folder)
        self._vocab_size = config.model.vocab_size
        self._check_tokenizer(folder)
        manifest.verify_shards(folder, self.manifest, hashes=config.data.verify == "hash")
        seq_len = config.train.seq_len
        self._train = Windows(folder, self.manifest, "train", seq_len=seq_len)
        self._valid = Windows(folder, self.manifest, "valid", seq_len=seq_len)
        self._batch_size, self._eval_size = config.train.batch_size, config.evaluation.batch_size
        order = grain.MapDataset.range(len(self._train)).seed(config.train.seed)
        self._order = order.shuffle().repeat()
        self.fingerprint = self.manifest.fingerprint()
        self.valid_bytes = self.manifest.valid.text_bytes

    def sequences(self, step: int) -> np.ndarray:
        first = (step - 1) * self._batch_size
        indices = [int(self._order[first + row]) for row in range(self._batch_size)]
        return np.stack([self._checked(self._train, index) for index in indices])

    def valid_batches(self) -> Iterator[EvalBatch]:
        # The windows of the split follow each other: sequence i predicts targets i*T to (i+1)*T-1.
        count = math.ceil(self._valid.split.targets / self._valid.seq_len)
        for first in range(0, count, self._eval_size):
            rows = range(first, min(first + self._eval_size, count))
            ids = [self._checked(self._valid, index) for index in rows]
            missing = self._eval_size - len(ids)
            yield eval_batch(
                np.stack(ids + ids[-1:] * missing),
                first_target=first * self._valid.seq_len,
                num_targets=self._valid.split.targets,
            )

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
        if not path.is_file() or tokenizer.tokenizer_sha256(path) != found.tokenizer_sha256:
            raise DataError(f"{path} is not the tokenizer the shards were written with.")


class SyntheticSource:
    """Random ids with a Zipf-like (log-uniform) frequency, for benchmarks. One byte a token."""

    VALID_BATCHES = 4

    def __init__(self, config: Config):
        self._config = config
        shape = (config.train.batch_size, config.train.seq_len, config.model.vocab_size)
        self.fingerprint = {"synthetic": f"seed {config.train.seed}, shape {shape}"}
        rows = self.VALID_BATCHES * config.evaluation.batch_size
        self.valid_bytes = rows * config.train.seq_len

    def sequences(self, step: int) -> np.ndarray:
        return self._draw((self._config.train.seed, step), self._config.train.batch_size)

    def valid_batches(self) -> Iterator[EvalBatch]:
        rows = self._config.evaluation.batch_size
        for index in range(self.VALID_BATCHES):
            ids = self._draw((self._config.train.seed, 0, index), rows)
            yield eval_batch(ids, first_target=0, num_targets=ids.size)

    def _draw(self, key: tuple[int, ...], rows: int) -> np.ndarray:
        uniform = np.random.default_rng(key).random((rows, self._config.train.seq_len + 1))
        vocab_size = self._config.model.vocab_size
        return np.minimum(np.exp(uniform * np.log(vocab_size + 1)) - 1, vocab_size - 1).astype(
            np.int32
        )


def eval_batch(sequences: np.ndarray, *, first_target: int, num_targets: int) -> EvalBatch:
    """Batch of `sequences` [B, T + 1] whose targets from `num_targets` on weigh nothing."""
    ids, targets = sequences[:, :-1], sequences[:, 1:]
    place = first_target + np.arange(targets.size).reshape(targets.shape)
    return EvalBatch(ids, targets, (place < num_targets).astype(np.float32))
