# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The frequent n-grams of a corpus, each with a row number: the file, and matching texts with it.

An n-gram is found by its prefix. Its key is (number of the prefix) * vocab_size + (last token),
where the number of a single token is its id, and that of a longer one its place among the n-grams
of its length. Keys of one length are sorted, so rows are in the order of their tokens. A key is the
n-gram itself and no hash of it: nothing else can match.

That works as every part of a frequent n-gram is frequent too. See `ngram_counts`.

The file is one of safetensors: `keys` and `counts`, uint64 [rows], by length, then in order. Its
metadata say what was counted, see `Description`, and have a digest of that and of both arrays.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import secrets
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import safetensors.numpy

from jtok_jax.errors import DataError

KIND, FORMAT = "jtok_jax frequent n-grams", 1
ARRAYS = ("keys", "counts")
NONE = -1  # the number of no n-gram


@dataclasses.dataclass(frozen=True)
class Description:
    """Says what the n-grams of a file are.

    rows: how many there are of each length from 2 to max_n. least_count: of the rarest kept.
    boundary_id: the token between documents; no n-gram has one but as its first token.
    tokenizer, corpus: digests of what was counted, those of a manifest's fingerprint.
    """

    rows: tuple[int, ...]
    vocab_size: int
    boundary_id: int
    least_count: int
    tokenizer: str
    corpus: str

    @property
    def max_n(self) -> int:
        return len(self.rows) + 1


class Match(NamedTuple):
    """The longest frequent n-gram that ends at each token."""

    rows: np.ndarray  # int32, NONE where there is none
    lengths: np.ndarray  # uint8, from 2; 1 where there is none


class FrequentNgrams:
    """n-grams of 2 to max_n tokens with their rows, numbered from 0."""

    def __init__(
        self,
        description: Description,
        keys: Sequence[np.ndarray],
        counts: Sequence[np.ndarray],
        digest: str = "",
    ):
        """keys, counts: uint64, sorted by key, of each length from 2. digest: of their file."""
        self.description, self.keys, self.counts = description, list(keys), list(counts)
        self.digest = digest
        self.offsets = np.cumsum([0, *description.rows])  # the first row of each length

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def match(self, ids_BT: np.ndarray, before_BC: np.ndarray | None = None) -> Match:
        """Return the longest n-gram that ends at each of int32 ids [B, T].

        Args:
            before_BC: ids before the first ones, each plus 1, and 0 where there is none: max_n - 1
                of them are enough. None: nothing comes before.
        """
        length, ids = ids_BT.shape[1], ids_BT.astype(np.int64)
        if before_BC is not None:
            ids = np.concatenate([before_BC.astype(np.int64) - 1, ids], axis=1)
        rows = np.full(ids.shape, NONE, np.int32)
        lengths = np.ones(ids.shape, np.uint8)
        numbers = ids  # of the n-gram of the last length that ends at each token
        for order, (keys, offset) in enumerate(zip(self.keys, self.offsets, strict=False), 2):
            numbers = self._extended(numbers, ids, keys)
            found = numbers != NONE
            np.copyto(rows, numbers + offset, where=found, casting="same_kind")
            lengths[found] = order
        first = ids.shape[1] - length
        return Match(rows[:, first:], lengths[:, first:])

    def _extended(self, numbers: np.ndarray, ids: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Return numbers [B, T] of the n-grams one longer than those of `numbers`."""
        found, of = np.full(ids.shape, NONE, np.int64), self.description
        wanted, there = extended_keys(
            numbers[:, :-1], ids[:, 1:], vocab_size=of.vocab_size, boundary_id=of.boundary_id
        )
        found[:, 1:][there] = find(keys, wanted[there])
        return found

    def tokens(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return int32 tokens [R, max_n] of rows, zeros after the last, and uint8 lengths [R].

        Raises IndexError: there is no such row.
        """
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"rows are {rows.min()} to {rows.max()}; there are {len(self)}.")
        lengths = np.searchsorted(self.offsets, rows, side="right") + 1
        tokens = np.zeros((len(rows), self.description.max_n), np.int32)
        numbers = rows - self.offsets[lengths - 2]
        vocab_size = np.uint64(self.description.vocab_size)
        for order in range(self.description.max_n, 1, -1):
            of_order = lengths >= order  # those longer are at their prefix of this length
            keys = self.keys[order - 2][numbers[of_order]]
            tokens[of_order, order - 1] = keys % vocab_size
            numbers[of_order] = keys // vocab_size
        tokens[:, 0] = numbers
        return tokens, lengths.astype(np.uint8)

    def save(self, path: pathlib.Path) -> None:
        """Write the file, whole or not at all. Raises DataError: it cannot be written."""
        arrays = {"keys": np.concatenate(self.keys), "counts": np.concatenate(self.counts)}
        fields = json.dumps(dataclasses.asdict(self.description), sort_keys=True)
        # One key: safetensors writes several in any order, and a file would differ each time.
        about = {"format": FORMAT, "description": fields, "sha256": _digest(fields, arrays)}
        metadata = {KIND: json.dumps(about, sort_keys=True)}
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            safetensors.numpy.save_file(arrays, partial, metadata=metadata)
            os.replace(partial, path)
        except (OSError, safetensors.SafetensorError) as error:
            raise DataError(f"{error}. Nothing was written to {path}.") from error
        finally:
            partial.unlink(missing_ok=True)


def open_ngrams(path: pathlib.Path, *, tokenizer: str = "") -> FrequentNgrams:
    """Return the n-grams of a file, mapped into memory after its digest was compared.

    Args:
        tokenizer: digest of the one whose ids will be matched; "": not compared.

    Raises:
        DataError: there is no such file, it is another, or it was truncated or altered; or its
            n-grams are of another tokenizer.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > path.stat().st_size:
                raise ValueError("its header is cut off")
            header = json.loads(file.read(size))
        about = json.loads(header["__metadata__"][KIND])
        if about["format"] != FORMAT:
            raise ValueError(f"its format is {about['format']}, not {FORMAT}")
        fields = json.loads(about["description"])
        of = Description(**fields | {"rows": tuple(map(int, fields["rows"]))})
        arrays = {name: _mapped(path, 8 + size, header[name], sum(of.rows)) for name in ARRAYS}
        if _digest(about["description"], arrays) != about["sha256"]:
            raise ValueError("it was altered since it was written")
    except FileNotFoundError as error:
        raise DataError(f"{path} is not there. python -m jtok_jax.scone build makes it.") from error
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(f"{path} holds no frequent n-grams: {error}. Build it again.") from error
    if tokenizer and of.tokenizer != tokenizer:
        raise DataError(
            f"{path} holds n-grams of another tokenizer. Build it again from this corpus."
        )
    ends = np.cumsum(of.rows)[:-1]
    parts = {name: np.split(x, ends) for name, x in arrays.items()}
    return FrequentNgrams(of, **parts, digest=about["sha256"])


def extended_keys(
    numbers: np.ndarray, ids: np.ndarray, *, vocab_size: int, boundary_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return uint64 keys of n-grams, and where there can be one.

    Args:
        numbers: of the prefixes, NONE where there is none. ids: the tokens after them.
    """
    there = (numbers >= 0) & (ids >= 0) & (ids < vocab_size) & (ids != boundary_id)
    keys = numbers.astype(np.uint64) * np.uint64(vocab_size) + ids.astype(np.uint64)
    return keys, there


def find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the places of wanted keys [N] among sorted ones, NONE where they are not; int64.

    They are looked up in order: else every step of every search would miss the cache.
    """
    found = np.full(len(wanted), NONE, np.int64)
    if len(keys):
        order = np.argsort(wanted)
        ordered = wanted[order]
        places = np.searchsorted(keys, ordered)
        there = keys[np.minimum(places, len(keys) - 1)] == ordered
        found[order[there]] = places[there]
    return found


def _mapped(path: pathlib.Path, start: int, entry: dict, rows: int) -> np.ndarray:
    """Return an array of the file, whose data begin at `start`."""
    if entry["dtype"] != "U64" or entry["shape"] != [rows]:
        raise ValueError(f"it has {entry['dtype']} {entry['shape']} in place of {rows} words")
    if not rows:
        return np.empty(0, np.uint64)
    return np.memmap(path, np.uint64, "r", start + entry["data_offsets"][0], (rows,))


def _digest(description: str, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(description.encode())
    for name in ARRAYS:
        digest.update(np.ascontiguousarray(arrays[name]))
    return digest.hexdigest()
