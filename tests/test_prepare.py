# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Text into prepared corpora: every format, what is refused, and what a folder then holds."""

import dataclasses
import gzip
import hashlib
import json
import lzma
import resource

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from small import small_recipe, write_documents

from jtok_jax.data import corpus, manifest, tokenizer
from jtok_jax.data.windows import Windows, WindowWriter, allow_open_files
from jtok_jax.errors import DataError
from jtok_jax.prepare import main as prepare_main
from jtok_jax.prepare import prepare

replace = dataclasses.replace
ZSTD = pyarrow.Codec("zstd")


def texts(pattern: str, skipped=None) -> list[str]:
    return [
        one.content for one in corpus.read_documents(corpus.find_files(pattern), skipped=skipped)
    ]


# --------------------------------------------------------------------------- reading


def test_every_format_gives_the_same_documents(tmp_path):
    documents = ["first\nline", "zw\u00f6lf \U0001f600", "a" * 3000]
    lines = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in documents).encode()
    writers = {
        "a.jsonl": lines,
        "b.jsonl.gz": gzip.compress(lines),
        "c.jsonl.xz": lzma.compress(lines),
        "d.jsonl.zst": ZSTD.compress(lines, asbytes=True),
        "c4.00000.json.gz": gzip.compress(lines),
        "E.JSONL": lines,
        "f.jsonl.GZ": gzip.compress(lines),
    }
    for name, content in writers.items():
        (tmp_path / name).write_bytes(content)
        assert texts(str(tmp_path / name)) == documents
    table = pyarrow.table({"text": documents, "other": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "e.parquet")
    assert texts(str(tmp_path / "e.parquet")) == documents
    for index, text in enumerate(documents):
        (tmp_path / f"{index}.md").write_text(text)
    assert texts(str(tmp_path / "*.md")) == documents
    (tmp_path / "notes.json.txt").write_text(documents[0])
    assert texts(str(tmp_path / "notes*")) == documents[:1]
    (tmp_path / "z.txt.gz").write_bytes(gzip.compress(documents[1].encode()))
    assert texts(str(tmp_path / "z.txt.gz")) == [documents[1]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty document"),
        ("bad.txt", b"abc\xff", r"invalid UTF-8 at byte 3 \(0xff\)"),
        ("data.ids", bytes([7, 0, 9, 0]), "data.ids: binary, not text: NUL at character 1"),
        ("empty.jsonl", b"", "empty document"),
        ("blank.jsonl", b'{"text": ""}\n', "blank.jsonl:1: empty document"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "bad.jsonl:2: invalid UTF-8"),
        ("lone.jsonl", b'{"text": "\\ud800"}\n', "lone surrogate"),
    ],
)
def test_bad_text_is_refused_or_counted(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        texts(str(path))
    assert "--on_bad_text=skip" in str(caught.value)
    skipped = corpus.Skipped()
    texts(str(path), skipped)
    assert sum(skipped.counts.values()) == 1
    assert name in skipped.describe()[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "cut.jsonl.gz",
            gzip.compress(b'{"text": "abc"}\n' * 500, mtime=0)[:-20],
            "interrupted copy",
        ),
        ("cut.jsonl.xz", lzma.compress(b'{"text": "abc"}\n' * 500)[:-20], "interrupted copy"),
        (
            "cut.jsonl.zst",
            ZSTD.compress(b'{"text": "abc"}\n' * 500, asbytes=True)[:-9],
            "interrupted copy",
        ),
        ("not.jsonl", b"hello\n", "not.jsonl:1: not JSON"),
        ("other.jsonl", b'{"content": "x"}\n', 'no string under "text"'),
        ("list.jsonl", b"[1]\n", 'no string under "text"'),
        ("not.parquet", b"hello", "cannot be read to its end"),
    ],
)
def test_damaged_files_are_refused_even_when_skipping_bad_text(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(str(tmp_path / name), corpus.Skipped())


def test_parquet_without_text_and_patterns_without_files_are_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"no column \"text\"\. Its keys: body"):
        texts(str(tmp_path / "x.parquet"))
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "y.parquet")
    with pytest.raises(DataError, match='"text" holds int64'):
        texts(str(tmp_path / "y.parquet"))
    with pytest.raises(DataError, match="No file matches"):
        texts(str(tmp_path / "*.none"))


def test_embedded_corpus_is_the_standard_library():
    files = corpus.find_files(corpus.STDLIB)
    assert len(files) > 500
    assert any(path.name == "dataclasses.py" for path in files)
    assert not any("site-packages" in path.parts for path in files)


# --------------------------------------------------------------------------- preparing


def test_windows_cover_every_token_once(tmp_path):
    """Concatenated, the targets of a split are its documents, each with an end token."""
    documents = [list(range(1, 1 + length)) for length in (3, 11, 1, 25, 7)]
    stream = np.concatenate([[*ids, 0] for ids in documents])
    for pad_tail in (True, False):
        folder = tmp_path / str(pad_tail)
        folder.mkdir()
        writer = WindowWriter(folder, "valid", seq_len=8, dtype="uint16", end_id=0)
        for ids in documents:
            writer.add(ids, text_bytes=len(ids))
        split = writer.close(pad_tail=pad_tail)
        whole = manifest.Manifest(1, 8, "uint16", 99, 0, "", split, split, {}, {})
        for seq_len in (8, 4, 2):
            windows = Windows(folder, whole, "valid", seq_len=seq_len)
            sequences = [windows[index] for index in range(len(windows))]
            targets = np.concatenate([ids[1:] for ids in sequences])
            np.testing.assert_array_equal(targets[: split.targets], stream[: split.targets])
            inputs = np.concatenate([ids[:-1] for ids in sequences])
            np.testing.assert_array_equal(inputs[1 : split.targets], stream[: split.targets - 1])
            assert inputs[0] == 0
        assert split.targets == (52 if pad_tail else 48)
        assert split.dropped_ids == (0 if pad_tail else 4)
        assert (split.documents, split.text_bytes) == (5, 47)


def test_shards_rotate_and_locate(tmp_path, monkeypatch):
    monkeypatch.setattr("jtok_jax.data.windows.SHARD_BYTES", 60)
    writer = WindowWriter(tmp_path, "train", seq_len=8, dtype="uint16", end_id=0)
    writer.add(list(range(1, 82)), text_bytes=81)
    split = writer.close(pad_tail=False)
    assert [shard.windows for shard in split.shards] == [3, 3, 3, 1]
    whole = manifest.Manifest(1, 8, "uint16", 99, 0, "", split, split, {}, {})
    windows = Windows(tmp_path, whole, "train", seq_len=4)
    np.testing.assert_array_equal(windows[7], [28, 29, 30, 31, 32])
    assert windows.locate(7) == "train-00001.array_record record 0 from position 4"


def test_prepare_holds_out_whole_documents_and_counts_bytes(tmp_path):
    write_documents(tmp_path)
    result = prepare(small_recipe(tmp_path), tmp_path / "out")
    files = sorted(tmp_path.glob("*.txt"))
    held = [
        text
        for text in (path.read_text() for path in files)
        if int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < 0.2 * 2**64
    ]
    assert result.valid.documents == len(held)
    assert result.train.documents == len(files) - len(held)
    assert result.valid.text_bytes == sum(len(text.encode()) for text in held)
    encoder = tokenizer.load_tokenizer(tmp_path / "out" / "tokenizer.json")
    ids = [[*encoder.encode(text).ids, result.end_id] for text in held]
    windows = Windows(tmp_path / "out", result, "valid", seq_len=64)
    targets = np.concatenate([windows[index][1:] for index in range(len(windows))])
    np.testing.assert_array_equal(targets[: result.valid.targets], np.concatenate(ids))
    assert encoder.decode(targets[: len(ids[0]) - 1].tolist()) == held[0]
    assert manifest.read_manifest(tmp_path / "out") == result


def test_prepare_again_does_nothing_and_other_options_are_refused(tmp_path, capsys):
    write_documents(tmp_path)
    recipe = small_recipe(tmp_path)
    first = prepare(recipe, tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert prepare(recipe, tmp_path / "out") == first
    assert "nothing to do" in capsys.readouterr().out
    path = tmp_path / "out" / "manifest.json"
    earlier = json.loads(path.read_text())
    del earlier["recipe"]["text_key"]  # as an earlier version wrote it
    path.write_text(json.dumps(earlier))
    before = path.stat().st_mtime_ns
    prepare(recipe, tmp_path / "out")
    with pytest.raises(DataError, match="seq_len: 64, now 32"):
        prepare(replace(recipe, seq_len=32), tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before


def test_interrupted_prepare_leaves_nothing_that_looks_finished(tmp_path, monkeypatch):
    write_documents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("jtok_jax.data.manifest.write_manifest", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(small_recipe(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    prepare(small_recipe(tmp_path), tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


def test_two_preparations_at_a_time_do_not_mix(tmp_path, monkeypatch):
    write_documents(tmp_path)
    recipe, write, calls = small_recipe(tmp_path), manifest.write_manifest, []

    def meanwhile(folder, found):
        calls.append(folder)
        if len(calls) == 1:
            prepare(recipe, tmp_path / "out")
        write(folder, found)

    monkeypatch.setattr("jtok_jax.data.manifest.write_manifest", meanwhile)
    with pytest.raises(DataError, match="not empty"):
        prepare(recipe, tmp_path / "out")
    assert len(set(calls)) == 2
    found = manifest.read_manifest(tmp_path / "out")
    manifest.verify_shards(tmp_path / "out", found, hashes=True)
    assert not list(tmp_path.glob(".out*"))


def test_a_corpus_of_many_shards_may_keep_them_open(monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 256), hard))
        allow_open_files(300)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 364
        monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
        allow_open_files(2)  # as in a container: fewer than are asked for, and enough
        monkeypatch.undo()
        with pytest.raises(DataError, match=r"shards are kept open, this machine allows \d+ files"):
            allow_open_files(1 << 40)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_all_of_a_text_is_encoded_and_as_text(tmp_path):
    """Whatever a tokenizer.json says of truncation and padding, and whatever the text says."""
    given = tokenizer.train_tokenizer(["some words and more"] * 9, vocab_size=300)
    given.enable_truncation(max_length=4)
    given.enable_padding(length=50)
    given.save(str(tmp_path / "tokenizer.json"))
    text = "words and <|endoftext|> words " * 5
    encoder = tokenizer.load_tokenizer(tmp_path / "tokenizer.json")
    ids = encoder.encode(text, add_special_tokens=False).ids
    end = tokenizer.end_token_id(encoder, tokenizer.END_TOKEN)
    assert end not in ids
    assert encoder.decode(ids) == text


def test_given_tokenizer_and_validation_files(tmp_path):
    write_documents(tmp_path)
    first = prepare(small_recipe(tmp_path), tmp_path / "a")
    again = small_recipe(
        tmp_path,
        tokenizer=str(tmp_path / "a" / "tokenizer.json"),
        vocab_size=0,
        valid_input=str(tmp_path / "00*.txt"),
    )
    second = prepare(again, tmp_path / "b")
    assert second.tokenizer_sha256 == first.tokenizer_sha256
    # Files that are held out are not trained on, though --input matches them too.
    assert (second.train.documents, second.valid.documents) == (30, 10)
    with pytest.raises(DataError, match=r"All files of --input=.* are held out"):
        prepare(replace(again, valid_input=again.input), tmp_path / "none")
    with pytest.raises(DataError, match=r"no token '</s>'"):
        prepare(replace(again, end_token="</s>"), tmp_path / "c")
    with pytest.raises(DataError, match=r"not a readable tokenizer\.json"):
        prepare(replace(again, tokenizer=str(tmp_path / "000.txt")), tmp_path / "d")


def test_documents_held_out_do_not_train_under_another_name(tmp_path, capsys):
    write_documents(tmp_path)
    (tmp_path / "held").mkdir()
    for number in (3, 7):
        text = (tmp_path / f"{number:03d}.txt").read_text()
        (tmp_path / "held" / f"other-{number}.txt").write_text(text)
    recipe = replace(small_recipe(tmp_path), valid_input=str(tmp_path / "held" / "*.txt"))
    found = prepare(recipe, tmp_path / "out")
    assert (found.train.documents, found.valid.documents) == (38, 2)
    assert found.skipped == {"held out": 2}
    assert "skipped 2 (held out), e.g. also a document of --valid_input" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"valid_fraction": 0.0}, r"valid split has 0 documents .*fraction \(there are \d+ doc"),
        ({"valid_fraction": 1.0}, "train split has 0 documents"),
        ({"seq_len": 100_000}, "no window of 100000 tokens"),
        ({"vocab_size": 100}, "too small"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"valid_fraction": 1.5}, "expected 0 to 1"),
        ({"tokenizer": "x.json"}, "--tokenizer takes one"),
    ],
)
def test_impossible_recipes_are_refused(tmp_path, changes, message):
    write_documents(tmp_path)
    with pytest.raises(DataError, match=message):
        prepare(small_recipe(tmp_path, **changes), tmp_path / "out")


def test_the_tail_of_a_single_text_is_held_out_and_never_trains(tmp_path, capsys):
    lines = [f"{i} a word and another" for i in range(400)]
    text = "\n".join([*lines, "tail \u0416 " * 20])
    (tmp_path / "all.txt").write_text(text)
    result = prepare(small_recipe(tmp_path, valid_fraction=0.1), tmp_path / "out")
    assert "the last 10% of each is held out, from a line" in capsys.readouterr().out
    encoder = tokenizer.load_tokenizer(tmp_path / "out" / "tokenizer.json")
    parts = {}
    for name in ("train", "valid"):
        windows = Windows(tmp_path / "out", result, name, seq_len=64)
        ids = np.concatenate([windows[index][1:] for index in range(len(windows))])
        parts[name] = encoder.decode(ids[: getattr(result, name).targets].tolist())
    assert text.startswith(parts["train"])
    assert text.endswith(parts["valid"])
    assert parts["valid"].startswith("36")  # a whole line
    assert result.train.text_bytes + result.valid.text_bytes == len(text.encode())
    assert 0.1 <= result.valid.text_bytes / len(text.encode()) <= 0.13
    assert "\u00d0\u0138" not in encoder.get_vocab()  # bytes of the tail's letter are not merged


def test_tails_are_held_out_where_all_documents_fall_on_one_side(tmp_path, capsys):
    write_documents(tmp_path, count=3)
    result = prepare(small_recipe(tmp_path, valid_fraction=1e-3), tmp_path / "out")
    assert "Too few documents to hold out whole ones" in capsys.readouterr().out
    assert result.train.documents == result.valid.documents == 3
    assert result.held_out == "tails"


def test_prepare_command_line(tmp_path, capsys):
    write_documents(tmp_path)
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    arguments = [f"--input={tmp_path}/*.txt", f"--output={tmp_path}/out", "--vocab_size=300"]
    arguments += ["--valid_fraction=0.2", "--seq_len=64"]
    with pytest.raises(SystemExit) as stop:
        prepare_main(arguments)
    assert stop.value.code == 5
    assert "DataError" in capsys.readouterr().err
    prepare_main([*arguments, "--on_bad_text=skip"])
    prepare_main([*arguments, "--on-bad-text=skip"])  # the former spelling
    out = capsys.readouterr().out
    assert "skipped 1 (not UTF-8)" in out
    assert "vocabulary 300, windows of 64 tokens" in out
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["skipped"] == {
        "not UTF-8": 1
    }
