# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Frequent n-grams: counts, rows, matches and files, against counting and looking one by one."""

import collections
import dataclasses
import errno
import json
import os
import re
import shutil

import numpy as np
import pytest
import safetensors
from pythons import oldest

from jtok_jax import scone
from jtok_jax.data import manifest
from jtok_jax.data.ngram_counts import Counter, most_frequent
from jtok_jax.data.ngrams import NONE, Description, FrequentNgrams, open_ngrams
from jtok_jax.data.windows import Windows
from jtok_jax.errors import ConfigError, DataError

pytestmark = oldest
VOCAB, END, MAX_N = 7, 3, 4


def draw_tokens(seed: int, size: int = 900) -> np.ndarray:
    """Ids of a few documents; some are empty, and runs of them repeat."""
    rng = np.random.default_rng(seed)
    tokens = np.minimum(rng.geometric(0.4, size) - 1, VOCAB - 1)
    return np.concatenate([[END], tokens, np.tile(tokens[: size // 3], 2)]).astype(np.uint16)


def count_one_by_one(tokens, max_n: int, min_count: int) -> dict[tuple, int]:
    """Counts by n-gram of those all parts of which are frequent."""
    frequent = {(token,): min_count for token in set(tokens.tolist())}
    for order in range(2, max_n + 1):
        found = collections.Counter()
        for end in range(order, len(tokens) + 1):
            ngram = tuple(tokens[end - order : end].tolist())
            if END not in ngram[1:] and ngram[1:] in frequent and ngram[:-1] in frequent:
                found[ngram] += 1
        frequent |= {ngram: count for ngram, count in found.items() if count >= min_count}
    return {ngram: count for ngram, count in frequent.items() if len(ngram) > 1}


def match_one_by_one(known: dict[tuple, int], sequence: list[int], end: int) -> tuple[int, int]:
    """(row, length) of the longest known n-gram whose last token is `sequence[end]`."""
    for order in range(min(MAX_N, end + 1), 1, -1):
        ngram = tuple(sequence[end - order + 1 : end + 1])
        if ngram in known:
            return known[ngram], order
    return NONE, 1


def build(tokens, folder, *, rows: int, min_count: int = 3, **sizes) -> FrequentNgrams:
    counter = Counter(
        tokens, vocab_size=VOCAB, boundary_id=END, min_count=min_count, folder=folder, **sizes
    )
    kept = most_frequent(counter.count(MAX_N), rows, vocab_size=VOCAB)
    numbers = tuple(len(one.keys) for one in kept)
    return FrequentNgrams(Description(numbers, VOCAB, END, 1, "", ""), *zip(*kept, strict=True))


def by_ngram(ngrams: FrequentNgrams) -> dict[tuple, tuple[int, int]]:
    """(row, count) of every n-gram."""
    tokens, lengths = ngrams.tokens(np.arange(len(ngrams)))
    counts = np.concatenate(ngrams.counts).tolist()
    pairs = zip(tokens.tolist(), lengths.tolist(), strict=True)
    return {tuple(ids[:length]): (row, counts[row]) for row, (ids, length) in enumerate(pairs)}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("chunk", "merged", "workers"), [(1 << 20, 1 << 20, 1), (50, 16, 3)])
def test_counts_are_those_of_a_slow_counter(tmp_path, seed, chunk, merged, workers):
    tokens = draw_tokens(seed)
    sizes = {"chunk": chunk, "merged": merged, "workers": workers}
    expected = count_one_by_one(tokens, MAX_N, 3)
    found = by_ngram(build(tokens, tmp_path, rows=10**6, **sizes))
    assert {ngram: count for ngram, (_, count) in found.items()} == expected
    assert {len(ngram) for ngram in expected} == {2, 3, 4}
    assert any(ngram[0] == END for ngram in expected)


@pytest.mark.parametrize("rows", [1, 5, 40, 90])
def test_the_most_frequent_are_kept_and_of_equal_ones_the_shorter(tmp_path, rows):
    tokens = draw_tokens(0)
    expected = count_one_by_one(tokens, MAX_N, 3)
    ranked = sorted(expected, key=lambda ngram: (-expected[ngram], len(ngram), ngram))
    found = by_ngram(build(tokens, tmp_path, rows=rows))
    assert len(ranked) > rows
    assert set(found) == set(ranked[:rows])
    in_order = sorted(found, key=lambda ngram: (len(ngram), ngram))
    assert [found[ngram][0] for ngram in in_order] == list(range(rows))


@pytest.mark.parametrize("seed", range(3))
def test_the_longest_that_ends_at_a_token_is_found(tmp_path, seed):
    """It is found in text that was counted and in other text, with ids before it and without."""
    ngrams = build(draw_tokens(seed), tmp_path, rows=60)
    known = {ngram: row for ngram, (row, _) in by_ngram(ngrams).items()}
    ids = np.stack([draw_tokens(seed)[:200], draw_tokens(seed + 9)[:200]]).astype(np.int32)
    match = ngrams.match(ids)
    expected = [
        [match_one_by_one(known, sequence, end) for end in range(200)] for sequence in ids.tolist()
    ]
    np.testing.assert_array_equal(match.rows, np.array(expected)[..., 0])
    np.testing.assert_array_equal(match.lengths, np.array(expected)[..., 1])
    assert set(match.lengths.ravel().tolist()) == {1, 2, 3, 4}
    for first in (1, 2, 50):  # as in decode, where the last ids alone are kept
        before = ids[:, max(0, first - MAX_N + 1) : first] + 1
        padded = np.pad(before, ((0, 0), (MAX_N - 1 - before.shape[1], 0)))
        later = ngrams.match(ids[:, first:], padded)
        np.testing.assert_array_equal(later.rows, match.rows[:, first:])
        np.testing.assert_array_equal(later.lengths, match.lengths[:, first:])


def test_a_later_token_changes_no_earlier_match(tmp_path):
    ngrams = build(draw_tokens(1), tmp_path, rows=80)
    ids = draw_tokens(2)[None, :100].astype(np.int32)
    for place in (20, 60, 99):
        other = ids.copy()
        other[0, place] = (ids[0, place] + 1) % VOCAB
        left, right = ngrams.match(ids), ngrams.match(other)
        np.testing.assert_array_equal(left.rows[:, :place], right.rows[:, :place])
    assert (ngrams.match(ids).rows != NONE).any()


def test_keys_of_the_largest_vocabulary_do_not_overflow(tmp_path):
    """(2^31 - 1) * 2^31 and more fits 64 bits without a sign."""
    most = (1 << 31) - 1
    tokens = np.array([0, most - 1, most - 2] * 6, np.uint32)
    counter = Counter(tokens, vocab_size=most, boundary_id=0, min_count=2, folder=tmp_path)
    kept = most_frequent(counter.count(3), 10, vocab_size=most)
    numbers = tuple(len(one.keys) for one in kept)
    ngrams = FrequentNgrams(Description(numbers, most, 0, 1, "", ""), *zip(*kept, strict=True))
    assert set(by_ngram(ngrams)) == {
        (0, most - 1), (most - 1, most - 2), (0, most - 1, most - 2)
    }  # fmt: skip


def run(corpus, output, *more: str) -> None:
    scone.main(["build", f"--data={corpus}", f"--output={output}", "--min_count=2", *more])


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp("ngrams") / "docs.ngrams"
    run(corpus, path, "--rows=500", "--max_n=4")
    return path


def test_command(corpus, built, capsys):
    """The n-grams of a corpus, counted over its documents and not over its windows."""
    ngrams, found = open_ngrams(built), manifest.read_manifest(corpus)
    windows = Windows(corpus, found, "train", seq_len=found.seq_len)
    parts = [windows[0], *(windows[index][1:] for index in range(1, len(windows)))]
    tokens, of = np.concatenate(parts), ngrams.description
    assert (of.vocab_size, of.boundary_id) == (found.vocab_size, found.end_id)
    assert of.corpus == found.fingerprint()["train"]
    assert len(ngrams) == sum(of.rows) == 500
    for ngram, (_, count) in list(by_ngram(ngrams).items())[::50]:
        places = np.lib.stride_tricks.sliding_window_view(tokens, len(ngram))
        assert (places == ngram).all(axis=1).sum() == count >= of.least_count
    run(corpus, built.with_name("more"), "--rows=400000000", "--workers=1")
    text = capsys.readouterr().out
    assert re.search(r"2 tokens: +[\d,]+ rows, at most [\d,]+ times: '", text)
    assert "fewer than the 400,000,000 asked for: no others are frequent" in text
    assert [path.name for path in built.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(("more", "error", "message"), [
    (["--max_n=1"], ConfigError, "--max_n is 1; expected 2 to 255"),
    (["--max_n=256"], ConfigError, "--max_n is 256; expected 2 to 255"),
    (["--rows=0"], ConfigError, "--rows is 0; expected 1 to 500000000"),
    (["--rows=3000000000"], ConfigError, "--rows is 3000000000; expected 1 to 500000000"),
    (["--min_count=100000"], DataError, "occur together 100000 times. Give more text"),
    (["--data=nowhere"], DataError, "nowhere"),
])  # fmt: skip
def test_what_cannot_be_built_is_refused(corpus, tmp_path, more, error, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(corpus, tmp_path / "out", "--rows=9", *more)
    assert stopped.value.code == error.exit_code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_without_the_token_that_parts_documents_is_refused(corpus, tmp_path):
    other = shutil.copytree(corpus, tmp_path / "corpus")
    found = manifest.read_manifest(corpus)
    windows = Windows(corpus, found, "train", seq_len=found.seq_len)
    used = {token for index in range(len(windows)) for token in windows[index].tolist()}
    unused = min({*range(found.vocab_size)} - used)
    dropped = 20
    assert found.train.documents > dropped + 1
    train = dataclasses.replace(found.train, dropped_ids=dropped)
    manifest.write_manifest(other, dataclasses.replace(found, end_id=unused, train=train))
    options = {"max_n": 3, "rows": 100, "min_count": 2, "workers": 1}
    with pytest.raises(DataError, match=f"documents, and the token {unused} that parts them is"):
        scone.build(other, tmp_path / "file", **options)
    assert not (tmp_path / "file").exists()
    train = dataclasses.replace(train, documents=dropped + 1)  # they may end in what is dropped
    manifest.write_manifest(other, dataclasses.replace(found, end_id=unused, train=train))
    assert len(scone.build(other, tmp_path / "file", **options)) == 100


def test_a_file_is_not_overwritten(corpus, built, capsys):
    before = built.read_bytes()
    with pytest.raises(SystemExit):
        run(corpus, built, "--rows=9")
    assert "exists; delete it first" in capsys.readouterr().err
    assert built.read_bytes() == before


def damaged(data: bytes, how: str) -> bytes:
    header = 8 + int.from_bytes(data[:8], "little")
    if how == "altered":
        return data[:-1] + bytes([data[-1] ^ 1])
    other = {
        "of another kind": (b"jtok_jax frequent n-grams", b"jtok_jax frequent n-grans"),
        "of a later format": (b'format\\": 1', b'format\\": 9'),
        "another vocabulary": (b'vocab_size\\\\\\": 300', b'vocab_size\\\\\\": 299'),
        "other words": (b'"U64"', b'"I64"'),
    }
    if how in other:
        assert other[how][0] in data
        return data.replace(*other[how])
    return data[: {"cut off": len(data) - 8, "header cut off": header // 2, "empty": 0}[how]]


@pytest.mark.parametrize(
    "how",
    [
        "altered",
        "of another kind",
        "of a later format",
        "another vocabulary",
        "other words",
        "cut off",
        "header cut off",
        "empty",
    ],
)
def test_a_damaged_file_is_refused(built, tmp_path, how):
    path = tmp_path / "file"
    path.write_bytes(damaged(built.read_bytes(), how))
    with pytest.raises(DataError, match=r"holds no frequent n-grams: .*Build it again"):
        open_ngrams(path)


def test_a_file_is_one_of_safetensors_and_says_what_it_is(built):
    ngrams = open_ngrams(built)
    with safetensors.safe_open(built, framework="numpy") as file:
        metadata, keys = file.metadata(), file.get_tensor("keys")
    np.testing.assert_array_equal(keys, np.concatenate(ngrams.keys))
    fields = json.loads(json.loads(metadata["jtok_jax frequent n-grams"])["description"])
    assert fields | {"rows": tuple(fields["rows"])} == dataclasses.asdict(ngrams.description)
    with pytest.raises(DataError, match=r"is not there\. python -m jtok_jax\.scone build"):
        open_ngrams(built.with_name("other"))


def test_a_file_is_the_same_each_time_and_knows_its_tokenizer(corpus, built):
    again = built.with_name("again")
    run(corpus, again, "--rows=500", "--max_n=4", "--workers=1")
    assert again.read_bytes() == built.read_bytes()
    own = manifest.read_manifest(corpus).tokenizer_sha256
    assert len(open_ngrams(built, tokenizer=own)) == 500
    with pytest.raises(DataError, match="n-grams of another tokenizer"):
        open_ngrams(built, tokenizer="0" * 64)


def test_ids_beyond_the_vocabulary_and_rows_that_are_none(tmp_path):
    ngrams = build(draw_tokens(1), tmp_path, rows=80)
    ids = draw_tokens(1)[None, :50].astype(np.int32)
    for other in (ids + VOCAB, ids.clip(max=1) + VOCAB):
        assert (ngrams.match(other).rows == NONE).all()
    assert ngrams.match(ids[:, :0], ids[:, :3] + 1).rows.shape == (1, 0)
    for row in (-1, len(ngrams)):
        with pytest.raises(IndexError, match="there are 80"):
            ngrams.tokens(np.array([row]))


def test_a_full_disk_ends_with_a_message(corpus, tmp_path, monkeypatch, capsys):
    """Room is taken before a file is mapped: a page that finds none would end the process."""

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(SystemExit):
        run(corpus, tmp_path / "out", "--rows=9")
    assert "No space left on device. Nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
