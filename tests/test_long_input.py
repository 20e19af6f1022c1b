# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Long files and documents: progress inside them, the same ids as in one go, a full disk."""

import json
import resource

import pytest
import tqdm
from small import small_recipe, write_documents
from tokenizers import pre_tokenizers

from jtok_jax.data import source, tokenizer
from jtok_jax.errors import DataError
from jtok_jax.prepare import main as prepare_main
from jtok_jax.prepare import prepare


@pytest.mark.parametrize("name", ["lines.jsonl", "array.json", "text.txt"])
def test_progress_moves_inside_a_file_up_to_its_end(tmp_path, monkeypatch, name):
    bars = []

    class Bar(tqdm.tqdm):
        def update(self, n=1):
            bars.append((self.desc, self.n + n, self.total))
            return super().update(n)

    monkeypatch.setattr(source, "PIECE", 5000)
    monkeypatch.setattr(source.tqdm, "tqdm", Bar)
    texts = [f"{i} one word and another" * 20 for i in range(300)]
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    array = f"[{','.join(lines.splitlines())}]"
    content = {"lines.jsonl": lines, "array.json": array, "text.txt": "\n".join(texts)}
    (tmp_path / name).write_text(content[name])
    prepare(small_recipe(tmp_path, input=str(tmp_path / name)), tmp_path / "out")
    for label in ("training the tokenizer", "encoding"):
        places = [place for desc, place, _ in bars if desc.startswith(label)]
        assert places == sorted(places)
        assert len(set(places)) > 10
        assert places[-1] == len(content[name])


def test_a_long_text_in_pieces_gives_the_same_corpus(tmp_path, monkeypatch):
    write_documents(tmp_path, count=12)
    odd = "it's  two\u00a0\u3000 and\t\n\n tabs!\x1c\x1f ?? '\n\r\n 12 \u0416's <|endoftext|> \n"
    (tmp_path / "odd.txt").write_text(odd * 40)
    whole = prepare(small_recipe(tmp_path), tmp_path / "whole")
    monkeypatch.setattr(source, "PIECE", 7)
    pieces = prepare(small_recipe(tmp_path), tmp_path / "pieces")
    assert pieces.fingerprint() == whole.fingerprint()
    encoder = tokenizer.load_tokenizer(tmp_path / "whole" / "tokenizer.json")
    assert tokenizer.may_cut(encoder)
    encoder.add_tokens(["two words"])
    assert not tokenizer.may_cut(encoder)
    encoder = tokenizer.load_tokenizer(tmp_path / "whole" / "tokenizer.json")
    encoder.pre_tokenizer = pre_tokenizers.Metaspace()
    assert not tokenizer.may_cut(encoder)


@pytest.mark.parametrize("size", [4_000, 30_000])  # the tokenizer does not fit; the shards do not
def test_a_full_disk_is_told_in_a_line_and_leaves_nothing(tmp_path, size):
    (tmp_path / "in").mkdir()
    write_documents(tmp_path / "in", count=150)
    options = [f"--input={tmp_path}/in", f"--output={tmp_path}/out", "--vocab_size=300"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # a disk that takes no more
    try:
        with pytest.raises(DataError, match=r"File too large.*\. Nothing was written to") as told:
            prepare(small_recipe(tmp_path / "in"), tmp_path / "out")
        with pytest.raises(SystemExit) as stop:
            prepare_main([*options, "--seq_len=64"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stop.value.code == 5
    assert "\n" not in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
