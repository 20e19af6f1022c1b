# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Token ids made elsewhere: every format gives the same corpus, and what is refused."""

import math
import pathlib
from typing import NamedTuple

import numpy as np
import pytest
from small import small_recipe, write_documents
from test_data import run_config

from jtok_jax import loading
from jtok_jax.config import Config
from jtok_jax.data import token_ids, tokenizer
from jtok_jax.data.loader import open_source
from jtok_jax.data.windows import Windows
from jtok_jax.errors import ConfigError, DataError
from jtok_jax.prepare import prepare
from jtok_jax.training.evaluate import Validation

END = 299
DOCUMENTS = [np.arange(1, 1 + length) % END for length in (200, 3, 77, 150)]
STREAM = np.concatenate([[*ids, END] for ids in DOCUMENTS])


def ids_recipe(path: pathlib.Path, **changes):
    options = {"input": str(path), "ids": "uint16", "end_id": END, "seq_len": 16}
    return small_recipe(path.parent, **options | changes)


class Saved(NamedTuple):
    """What is looked at of a checkpoint before its tokenizer."""

    data: dict
    config: Config = Config()


def write_raw(path):
    STREAM.astype("<u2").tofile(path)


def write_llmc(path):
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(STREAM)
    path.write_bytes(header.tobytes() + STREAM.astype("<u2").tobytes())


def write_numpy(path):
    np.save(path, np.concatenate([[END], STREAM[:-1]]).astype("uint16"))  # ends come first


def write_megatron(path, sequences=(100, 101, 3, 1, 78, 151)):
    write_raw(path)
    places = 2 * np.cumsum([0, *sequences[:-1]])
    index = b"MMIDIDX\0\0" + np.array([1], "<u8").tobytes() + b"\x08"
    index += np.array([len(sequences), 5], "<u8").tobytes()
    for values, dtype in ((sequences, "<i4"), (places, "<i8"), ((0, 2, 4, 5, 6), "<i8")):
        index += np.array(values, dtype).tobytes()
    path.with_suffix(".idx").write_bytes(index)


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.bin", write_raw), ("b.bin", write_llmc), ("c.npy", write_numpy), ("d.*", write_megatron)],
)
def test_every_format_gives_the_documents_between_the_ends(tmp_path, monkeypatch, name, write):
    monkeypatch.setattr(token_ids, "CHUNK", 64)
    monkeypatch.setattr("jtok_jax.data.source.PIECE", 50)
    write(tmp_path / name.replace("*", "bin"))
    (tmp_path / "val").mkdir()
    other = np.where(STREAM == END, END, (STREAM + 1) % END)  # no document of --input
    other.astype("<u2").tofile(tmp_path / "val" / "val.bin")
    valid = str(tmp_path / "val" / "val.bin")
    result = prepare(ids_recipe(tmp_path / name, valid_input=valid), tmp_path / "out")
    for split, stream in (("train", STREAM), ("valid", other)):
        found = getattr(result, split)
        windows = Windows(tmp_path / "out", result, split, seq_len=16)
        ids = np.concatenate([windows[index][1:] for index in range(len(windows))])
        np.testing.assert_array_equal(ids[: found.targets], stream[: found.targets])
        assert (found.documents, found.targets) == (4, len(STREAM) // 16 * 16 + (
            len(STREAM) % 16 if split == "valid" else 0
        ))  # fmt: skip


def test_without_a_tokenizer_bits_a_byte_are_unknown_and_text_is_refused(tmp_path, monkeypatch):
    """One document: its tail is held out."""
    (np.arange(4000) % END).astype("<u4").tofile(tmp_path / "a.bin")
    prepare(ids_recipe(tmp_path / "a.bin", ids="uint32"), tmp_path / "out")
    source = open_source(run_config(tmp_path / "out"))
    assert source.manifest.valid.targets == 800 + 1
    assert source.valid_bytes == 0
    assert "bits/byte unknown" in f"{Validation(1.0, math.nan):.4f}"
    saved = Saved(source.fingerprint)
    monkeypatch.setattr(loading, "load_params", lambda *_, **options: saved)
    with pytest.raises(ConfigError, match="prepared from token ids without a tokenizer"):
        loading.load(tmp_path, data=tmp_path / "out")


def test_with_their_tokenizer_ids_have_the_bytes_of_their_text(tmp_path):
    write_documents(tmp_path)
    texts = prepare(small_recipe(tmp_path), tmp_path / "text")
    path = tmp_path / "text" / "tokenizer.json"
    encoder = tokenizer.load_tokenizer(path)
    files = sorted(tmp_path.glob("*.txt"))
    ids = [[*encoder.encode(file.read_text()).ids, texts.end_id] for file in files]
    np.save(tmp_path / "a.npy", np.concatenate(ids).astype("int32"))
    changes = {"ids": "int32", "end_id": texts.end_id, "vocab_size": 0, "tokenizer": str(path)}
    result = prepare(ids_recipe(tmp_path / "a.npy", **changes), tmp_path / "ids")
    assert result.tokenizer_sha256 == texts.tokenizer_sha256
    sizes = [one.train.text_bytes + one.valid.text_bytes for one in (result, texts)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": "", "end_id": -1}, r"a\.bin: .*\nIt looks like token ids: pass --ids=uint16"),
        ({"vocab_size": 200, "end_id": 9}, r"token id 200 at place 199; expected 0 to 199"),
        ({"vocab_size": 200}, "--end_id is 299; expected 0 to 199"),
        ({"vocab_size": 0}, "--ids needs --tokenizer, which made them, or their --vocab_size"),
        ({"end_id": -1}, "--ids and --end_id go together"),
        ({"input": "a.npy"}, "holds int64, --ids is uint16.\nPass --ids=int64"),
        ({"input": "a.txt"}, r"token ids are read from \.bin and \.npy; found '\.txt'"),
        ({"input": "cut.bin"}, r"cut\.bin: cannot be read as token ids"),
    ],
)
def test_what_is_not_as_stated_is_refused(tmp_path, changes, message):
    write_raw(tmp_path / "a.bin")
    np.save(tmp_path / "a.npy", STREAM)
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "cut.bin").write_bytes(b"abc" * 7)
    if "input" in changes:
        changes["input"] = str(tmp_path / changes["input"])
    with pytest.raises(DataError, match=message):
        prepare(ids_recipe(tmp_path / "a.bin", **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()
