# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Tokenizers of every model, judged by their ids: ends of documents, unknown and lost text."""

import numpy as np
import pytest
import tokenizers
from small import small_recipe, write_documents
from test_data import run_config
from tokenizers import decoders, models, normalizers, pre_tokenizers

from jtok_jax.data import manifest
from jtok_jax.data.encoding import TextEncoder, encode_text
from jtok_jax.data.loader import open_source
from jtok_jax.data.tokenizer import (
    end_token_id,
    load_tokenizer,
    token_bytes,
    train_tokenizer,
)
from jtok_jax.errors import DataError
from jtok_jax.loading import LoadedRun
from jtok_jax.prepare import prepare

CHARS = "\n \u00e9\u2581" + "".join(map(chr, range(33, 127)))
END = "</s>"


def unigram():
    pieces = [("<unk>", 0.0), (END, -0.1), *((char, -3.0) for char in CHARS)]
    made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made


def words():
    made = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, END: 1, "a": 2}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def bytes_with_an_end_that_is_not_special():
    made = train_tokenizer(["some words and </s> more"] * 9, vocab_size=299)
    made.add_tokens([tokenizers.AddedToken(END, special=False, normalized=False)])
    return made


def byte_fallback():
    """Bytes stand in for what has no token of its own, as in Llama 2."""
    tokens = ["<unk>", END, *(f"<0x{byte:02X}>" for byte in range(256)), "a", "e", "ae"]
    vocab = {token: index for index, token in enumerate(tokens)}
    model = models.BPE(vocab, [("a", "e")], unk_token="<unk>", byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    made.add_tokens([tokenizers.AddedToken(END, special=False, normalized=False)])
    return made


def lower_case():
    made = bytes_with_an_end_that_is_not_special()
    made.normalizer = normalizers.Lowercase()
    return made


LOSSLESS = [bytes_with_an_end_that_is_not_special, byte_fallback]
MADE = [unigram, words, *LOSSLESS, lower_case]


@pytest.fixture(params=MADE, ids=lambda made: made.__name__)
def saved(request, tmp_path):
    path = tmp_path / f"{request.param.__name__}.json"
    request.param().save(str(path))
    return path


def given(path, **changes):
    options = {"tokenizer": str(path), "vocab_size": 0, "end_token": END, "max_lost_text": 1.0}
    return small_recipe(path.parent, **options | changes)


def test_an_end_token_in_a_text_is_no_end_of_document(saved):
    encoder = load_tokenizer(saved)
    end = end_token_id(encoder, END)
    text = f"a {END} a{END}{END} a </S> \u0416{END}"
    assert end in encoder.encode(text, add_special_tokens=False).ids
    counting = TextEncoder(encoder, end, max_lost=1.0)
    (ids,) = counting.encode(["train"], [text])
    assert end not in ids
    assert ids == encode_text(encoder, text, end)
    assert counting.counts["train"]["ends"] == 4
    assert "spells '</s>' 4 times, kept as text" in counting.describe("train")
    assert "spells" not in counting.describe("valid")


def test_a_tokenizer_that_loses_text_is_refused_or_has_no_bits_a_byte(saved, tmp_path, capsys):
    write_documents(tmp_path)
    for path in tmp_path.glob("*.txt"):
        path.write_text(path.read_text().title() + "\u0416 " * 9)
    lossless = saved.stem in [made.__name__ for made in LOSSLESS]
    if not lossless:
        message = r"loses \d+\.\d+% of the \w+ text; expected at most 1\.00%, --max_lost_text\.\n"
        with pytest.raises(DataError, match=message) as told:
            prepare(given(saved, max_lost_text=0.01), tmp_path / "out")
        assert str(told.value).count("\n") == 2
        assert not (tmp_path / "out").exists()
    prepare(given(saved), tmp_path / "out")
    assert "of tokens unknown" in capsys.readouterr().out
    lost = manifest.lost_share(manifest.read_manifest(tmp_path / "out").text["valid"])
    assert (lost == 0) == lossless
    assert (open_source(run_config(tmp_path / "out")).valid_bytes > 0) == lossless


def test_a_prompt_that_spells_the_end_token_is_text():
    made = bytes_with_an_end_that_is_not_special()
    end = end_token_id(made, END)
    ids = LoadedRun(None, None, made, end, 0).encode(f"a{END}b")
    assert ids[0] == end
    assert end not in ids[1:]


def test_bpe_dropout_is_turned_off(tmp_path):
    made = train_tokenizer(["abab cabcab"] * 9, vocab_size=262)
    made.model.dropout = 0.5
    made.save(str(tmp_path / "tokenizer.json"))
    text = "abab cabcab " * 20
    assert len({tuple(made.encode(text).ids) for _ in range(5)}) > 1
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert len({tuple(again.encode(text).ids) for _ in range(5)}) == 1


def test_the_bytes_of_a_token_are_what_it_decodes_to():
    """Also of added tokens whose characters stand for bytes, and of those beyond them."""
    made = bytes_with_an_end_that_is_not_special()
    made.add_tokens(["\u00e9t\u00e9", "\u4e00 \u00e9", "two words"])
    pieces, rng = token_bytes(made), np.random.default_rng(0)
    assert len(pieces) == made.get_vocab_size()
    for length in [1] * len(pieces) + [7] * 300:
        ids = rng.integers(len(pieces), size=length).tolist()
        decoded = b"".join(pieces[one] for one in ids).decode(errors="replace")
        assert decoded == made.decode(ids, skip_special_tokens=False)
    assert token_bytes(byte_fallback()) is token_bytes(words()) is None


def test_an_end_token_that_texts_need_is_refused(tmp_path):
    write_documents(tmp_path, count=3)
    for made, end in ((words, "[UNK]"), (unigram, "e")):
        made().save(str(tmp_path / "given.json"))
        with pytest.raises(DataError, match="is also a character of the text, or unknown ones"):
            prepare(given(tmp_path / "given.json", end_token=end), tmp_path / "out")


def test_a_likely_end_token_is_proposed():
    made = unigram()
    with pytest.raises(
        DataError, match=r"no token '<\|endoftext\|>' .*\nLikely: --end_token='</s>'"
    ):
        end_token_id(made, "<|endoftext|>")
    made.add_special_tokens(["<|im_end|>"])
    with pytest.raises(DataError, match=r"It also has '<\|im_end\|>'"):
        end_token_id(made, "<|endoftext|>")


def test_what_a_model_cannot_encode_at_all_is_told(tmp_path):
    made = tokenizers.Tokenizer(models.WordLevel({END: 0, "a": 1}))
    counting = TextEncoder(made, 0, max_lost=1.0)
    with pytest.raises(DataError, match="does not encode the text: WordLevel error"):
        counting.encode(["train"], ["zzz"])
