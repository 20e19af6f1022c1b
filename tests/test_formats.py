# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Files as people have them: folders, arrays, categories, nulls, marks, long windows."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
from test_prepare import texts

from jtok_jax.data import corpus
from jtok_jax.errors import DataError
from jtok_jax.prepare import main as prepare_main

MARK = b"\xef\xbb\xbf"


def test_a_folder_gives_all_its_files_but_hidden_ones(tmp_path):
    for name in ("b.txt", "a/c.txt", ".hidden", ".git/x.txt", "a/.d/e.txt"):
        path = tmp_path / ".above" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    assert texts(str(tmp_path / ".above")) == ["a/c.txt", "b.txt"]


def test_json_arrays_hold_objects_or_strings(tmp_path):
    records = [{"text": "first"}, "second\n", {"text": None, "id": 3}]
    content = MARK + json.dumps(records, indent=1).encode()
    (tmp_path / "a.json").write_bytes(content)
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(content))
    skipped = corpus.Skipped()
    assert texts(str(tmp_path / "*.json*"), skipped) == ["first", "second\n"] * 2
    assert skipped.counts == {"empty": 2}
    assert "a.json[2]" in skipped.examples["empty"]
    (tmp_path / "c.json").write_bytes(content[:-5])
    with pytest.raises(DataError, match=r"c\.json: not a JSON array"):
        texts(str(tmp_path / "c.json"))


def test_nulls_are_empty_documents_in_every_format(tmp_path):
    table = pyarrow.table({"text": pyarrow.array(["x", None, "y"]).dictionary_encode()})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"text": null}\n{"text": "y"}\n')
    for name in ("a.parquet", "b.jsonl"):
        skipped = corpus.Skipped()
        assert texts(str(tmp_path / name), skipped) == ["x", "y"]
        assert skipped.counts == {"empty": 1}


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(MARK + b"abc")
    (tmp_path / "b.jsonl").write_bytes(MARK + b'{"text": "abc"}\n')
    assert texts(str(tmp_path / "*")) == ["abc", "abc"]


def test_names_lines_and_keys_are_taken_as_they_are(tmp_path):
    """Names beyond ASCII, line ends of Windows, and of a key that stands twice the last value."""
    folder = tmp_path / "t\u00e9xts \u6587"
    folder.mkdir()
    (folder / "\u00e9 1.txt").write_bytes(b"a\r\nb\r\n")
    (folder / "\u00e9 2.jsonl").write_bytes(b'{"text": "x", "text": "y"}\r\n{"text": "z"}\r\n')
    assert texts(str(folder / "\u00e9*")) == ["a\r\nb\r\n", "y", "z"]


def test_zstd_with_a_long_window(tmp_path, monkeypatch):
    content = b"a line\n" * 9
    block = (len(content) << 3 | 1).to_bytes(3, "little")  # raw, the last one
    window = 31 - 10 << 3  # 2 GiB
    path = tmp_path / "a.txt.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd\0" + bytes([window]) + block + content)
    if corpus.shutil.which("zstd"):
        assert texts(str(path)) == [content.decode()]
        (tmp_path / "cut.zst").write_bytes(path.read_bytes()[:-4])
        with pytest.raises(DataError, match="cannot be read to its end"):
            texts(str(tmp_path / "cut.zst"))
    monkeypatch.setattr(corpus.shutil, "which", lambda _: None)
    with pytest.raises(DataError, match=r"window over 128 MiB .* Install it"):
        texts(str(path))


def test_another_text_key_is_named_or_the_keys_are_listed(tmp_path, capsys):
    rows = [{"id": i, "content": f"{i} words and words " * 9} for i in range(60)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(DataError, match=r"\"text\"\. Its keys: id, content\. .*--text_key=KEY"):
            texts(str(tmp_path / name))
        options = [f"--input={tmp_path / name}", f"--output={tmp_path / 'out' / name}"]
        prepare_main([*options, "--text_key=content", "--vocab_size=300", "--seq_len=64"])
        assert "60 documents" in capsys.readouterr().out
