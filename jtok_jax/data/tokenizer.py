# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Byte-level BPE with the `tokenizers` library: train one, or take a tokenizer.json."""

import json
import pathlib
from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jtok_jax.errors import DataError

END_TOKEN = "<|endoftext|>"
END_TOKENS = (  # of documents, the likeliest first; then of turns
    "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eos|>", "[SEP]", "<|im_end|>",
    "<|eot_id|>",
)  # fmt: skip
FILE_NAME = "tokenizer.json"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> tokenizers.Tokenizer:
    """Return a byte-level BPE of at most `vocab_size` entries, end token and 256 bytes included."""
    if vocab_size < 257:
        raise DataError(
            f"--vocab_size={vocab_size} is too small; 256 bytes and the end token fit in 257."
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return _for_text(tokenizer)


def load_tokenizer(path: pathlib.Path) -> tokenizers.Tokenizer:
    """Return the tokenizer of a tokenizer.json. Raises DataError where there is none."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; expected a file such as {path / FILE_NAME}.")
    try:
        return _for_text(tokenizers.Tokenizer.from_file(str(path)))
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{path}: not a readable tokenizer.json ({error}).") from error


def _for_text(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Return a tokenizer that encodes all of a text, "<|endoftext|>" in it as text, too.

    The same text always gives the same ids: BPE dropout is for training with other segmentations.
    """
    tokenizer.no_truncation()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def may_cut(tokenizer: tokenizers.Tokenizer) -> bool:
    """Return whether a text cut before a space after a word gives the same ids as the whole."""
    parts = json.loads(tokenizer.to_str())
    words = parts["pre_tokenizer"] or {}
    plain = words.get("type") == "ByteLevel" and words.get("use_regex", True)
    added = any(not token["special"] for token in parts["added_tokens"])
    return plain and not words["add_prefix_space"] and not parts["normalizer"] and not added


def unknown_id(tokenizer: tokenizers.Tokenizer) -> int | None:
    """Return the id of what a tokenizer cannot write; None if its model has no such token."""
    model = json.loads(tokenizer.to_str())["model"]
    token = model.get("unk_token")
    return model.get("unk_id") if token is None else tokenizer.token_to_id(token)


def token_bytes(tokenizer: tokenizers.Tokenizer) -> list[bytes] | None:
    """Return the bytes that each id decodes to; None if decoding is more than to join them.

    A byte-level decoder reads characters that stand for bytes, and any other token as its text.
    """
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return None
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    beyond = (char for char in alphabet if ord(char) > 255)  # for bytes that cannot be printed
    byte_of = {chr(one) if chr(one) in alphabet else next(beyond): one for one in range(256)}
    vocabulary = tokenizer.get_vocab()
    found = [b""] * (max(vocabulary.values()) + 1)
    for token, place in vocabulary.items():
        plain = all(char in byte_of for char in token)
        found[place] = bytes(map(byte_of.get, token)) if plain else token.encode()
    return found


def end_token_id(tokenizer: tokenizers.Tokenizer, end_token: str) -> int:
    """Return the id of the token between documents. Raises DataError if there is no such token."""
    token_id = tokenizer.token_to_id(end_token)
    if token_id is None:
        likely = [one for one in END_TOKENS if tokenizer.token_to_id(one) is not None]
        advice = "Name one of its tokens with --end_token."
        if likely:
            others = f" It also has {', '.join(map(repr, likely[1:]))}." if likely[1:] else ""
            advice = f"Likely: --end_token='{likely[0]}'.{others}"
        raise DataError(
            f"The tokenizer has no token {end_token!r} to put between documents.\n{advice}"
        )
    return token_id
