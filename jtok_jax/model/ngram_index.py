# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The frequent n-grams of a model as arrays of its own, in which a device finds what tokens match.

Every n-gram has a number: that of one token is its id, that of a longer one vocab_rows + its row.
An n-gram is found by the number of its prefix and its last token, among the few of one hash bucket.
Both are compared, so nothing else can match. A checkpoint has these arrays as it has parameters:
whoever reads it needs no file of n-grams.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jtok_kernels import mixed

from jtok_jax.data.ngrams import Description, FrequentNgrams
from jtok_jax.model.variables import Index
from jtok_jax.streams import IdStream

NONE = -1  # the number of no n-gram
BUCKET = 16  # entries that are looked at: with one a bucket on average, none of 10^9 has more
FIELDS = 3  # of an entry: number of the prefix, last token, row
MODULE = "ngrams"  # where a model holds them, by stream


class NgramIndex(NamedTuple):
    """Hash buckets of n-grams, for a device; arrays of JAX, or of NumPy.

    starts: int32 [rows], the first entry of each bucket.
    entries: int32 [3 (rows + BUCKET)], flat: a TPU would pad an axis of 3 to 128 lanes.
    """

    starts: jax.Array
    entries: jax.Array


class NgramArrays(nnx.Module):
    """The index of one stream as part of a model; nothing matches until it is filled."""

    def __init__(self, stream: IdStream):
        empty = jnp.full(FIELDS * (stream.rows + BUCKET), NONE, jnp.int32)
        self.starts = Index(jnp.zeros(stream.rows, jnp.int32), "i")
        self.entries = Index(empty, "i")


class NgramStreams(nnx.Module):
    """The indices of all streams of frequent n-grams."""

    def __init__(self, streams: Mapping[str, IdStream]):
        for name, stream in streams.items():
            setattr(self, name, NgramArrays(stream))
        self._names = tuple(streams)

    @property
    def indices(self) -> dict[str, NgramIndex]:
        """Return the index of every stream."""
        held = {name: getattr(self, name) for name in self._names}
        return {name: NgramIndex(one.starts[...], one.entries[...]) for name, one in held.items()}


def names_of(stream: str) -> NgramIndex:
    """Return the names of the parameters that hold the index of a stream."""
    return NgramIndex(*(f"{MODULE}/{stream}/{field}" for field in NgramIndex._fields))


def indices_of(params: Mapping[str, jax.Array]) -> dict[str, NgramIndex]:
    """Return the index of every stream that parameters, by name, have."""
    names = {name.split("/")[1] for name in params if name.startswith(f"{MODULE}/")}
    return {name: NgramIndex(*(params[one] for one in names_of(name))) for name in names}


def build_index(ngrams: FrequentNgrams, stream: IdStream) -> NgramIndex:
    """Return the index of all n-grams, as many as `stream` has rows; arrays of NumPy."""
    own = np.uint64(ngrams.description.vocab_size)
    prefixes, tokens = [], []
    for order, keys in enumerate(ngrams.keys, 2):
        prefix, token = np.divmod(keys, own)
        longer = stream.vocab_rows + int(ngrams.offsets[order - 3]) if order > 2 else 0
        prefixes.append(prefix.astype(np.int32) + np.int32(longer))
        tokens.append(token.astype(np.int32))
    return _in_buckets(np.concatenate(prefixes), np.concatenate(tokens))


def _in_buckets(prefixes: np.ndarray, tokens: np.ndarray) -> NgramIndex:
    """Return the index of n-grams given by row."""
    rows = len(prefixes)
    buckets = _bucket(prefixes, tokens, rows)
    if np.bincount(buckets, minlength=1).max(initial=0) > BUCKET:
        raise AssertionError(f"a bucket of n-grams has more than {BUCKET} entries")
    order = np.argsort(buckets, kind="stable")
    entries = np.full((rows + BUCKET, FIELDS), NONE, np.int32)
    entries[:rows] = np.stack([prefixes, tokens, np.arange(rows)], axis=1)[order]
    starts = np.searchsorted(buckets[order], np.arange(rows)).astype(np.int32)
    return NgramIndex(starts, entries.reshape(-1))


def _by_row(index: NgramIndex, stream: IdStream) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of each n-gram's prefix, and its last token, by row."""
    prefix, token, row = np.asarray(index.entries).reshape(-1, FIELDS)[: stream.rows].T
    order = np.argsort(row)
    return prefix[order], token[order]


def with_more_tokens(index: NgramIndex, before: IdStream, after: IdStream) -> NgramIndex:
    """Return the index of the same n-grams in a model with more rows of the embedding."""
    if (np.asarray(index.entries) < 0).all():  # it was never filled
        return index
    prefix, token = _by_row(index, before)
    shift = np.where(prefix >= before.vocab_rows, after.vocab_rows - before.vocab_rows, 0)
    return _in_buckets((prefix + shift).astype(np.int32), token)


def ngrams_of(index: NgramIndex, stream: IdStream) -> FrequentNgrams:
    """Return the n-grams of an index, arrays of NumPy, without their counts: for the host.

    There a search in sorted keys takes a half of the time of these buckets for one token, and a
    seventh for 65,536.
    """
    prefix, token = _by_row(index, stream)
    if not len(token) or token[0] < 0:  # it was never filled
        prefix = token = np.empty(0, np.int32)
    keys, begin, first, numbers = [], 0, 0, stream.vocab_rows
    for _ in range(2, stream.order + 1):  # numbers of prefixes are in [first, numbers)
        end = begin + int(np.searchsorted(prefix[begin:], numbers))
        own = (prefix[begin:end] - first).astype(np.uint64)
        keys.append(own * np.uint64(stream.vocab_rows) + token[begin:end].astype(np.uint64))
        first, begin, numbers = stream.vocab_rows + begin, end, stream.vocab_rows + end
    about = Description(tuple(map(len, keys)), stream.vocab_rows, NONE, 0, "", "")
    return FrequentNgrams(about, keys, keys)


def numbers_by_length(index: NgramIndex, ids_BX: jax.Array, stream: IdStream) -> list[jax.Array]:
    """Return the number of the n-gram of each length that ends at each id, NONE where none does.

    Args:
        ids_BX: int32; NONE where there is no token.

    Returns:
        int32 [B, X] of the lengths 1, 2, ..., stream.order.
    """
    found, none_B1 = [ids_BX], jnp.full_like(ids_BX[:, :1], NONE)
    for _ in range(2, stream.order + 1):
        rows = _find(index, found[-1][:, :-1], ids_BX[:, 1:])
        number = jnp.where(rows >= 0, rows + stream.vocab_rows, NONE)
        found.append(jnp.concatenate([none_B1, number], axis=1))
    return found


def with_before(ids_BT: jax.Array, before_BC: jax.Array | None, order: int) -> jax.Array:
    """Return int32 [B, X], up to order - 1 ids of `before` and then `ids`; NONE where is none.

    `before_BC` is that of `tables.stream_ids`.
    """
    if before_BC is None:
        return ids_BT
    return jnp.concatenate([before_BC[:, -(order - 1) :] - 1, ids_BT], axis=1).astype(np.int32)


def longest(numbers: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return the number and the length, from 2, of the longest n-gram at each id; NONE and 1."""
    number, length = jnp.full_like(numbers[0], NONE), jnp.ones_like(numbers[0])
    for order, one in enumerate(numbers[1:], 2):
        number = jnp.where(one >= 0, one, number)
        length = jnp.where(one >= 0, order, length)
    return number, length


def frequent_ids(
    index: NgramIndex, ids_BT: jax.Array, before_BC: jax.Array | None, stream: IdStream
) -> jax.Array:
    """Return 1 + the row of the longest n-gram at each id, 0 where there is none; int32."""
    ids_BX = with_before(ids_BT, before_BC, stream.order)
    number, _ = longest(numbers_by_length(index, ids_BX, stream))
    number = number[:, number.shape[1] - ids_BT.shape[1] :]
    return jnp.where(number >= 0, number - (stream.vocab_rows - 1), 0)


def _find(index: NgramIndex, prefixes: jax.Array, tokens: jax.Array) -> jax.Array:
    """Return rows of the n-grams of a prefix by its number and a last token, NONE where not."""
    bucket = _bucket(prefixes, tokens, index.starts.shape[0]).astype(np.int32)
    first, width = FIELDS * index.starts[bucket], FIELDS * BUCKET
    # slices, which a TPU reads faster than words
    slice_at = lambda place: jax.lax.dynamic_slice(index.entries, (place,), (width,))
    entries = jax.vmap(slice_at)(first.reshape(-1)).reshape(*first.shape, BUCKET, FIELDS)
    equal = (entries[..., 0] == prefixes[..., None]) & (entries[..., 1] == tokens[..., None])
    equal = equal & ((prefixes >= 0) & (tokens >= 0))[..., None]
    return jnp.where(equal, entries[..., 2], NONE).max(axis=-1)


def _bucket(prefixes, tokens, buckets: int):
    words = lambda x: x.astype(np.uint32)
    return mixed(mixed(words(tokens)) ^ words(prefixes)) % np.uint32(max(buckets, 1))
