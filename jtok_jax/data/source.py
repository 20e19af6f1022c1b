# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The documents of a corpus to prepare, each in its split."""

import dataclasses
import hashlib
import itertools
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tqdm

from jtok_jax.data import corpus, manifest, token_ids
from jtok_jax.data.corpus import Document, Skipped
from jtok_jax.errors import DataError

PIECE = 1 << 18  # characters, or ids, of long documents that come in parts
WORD_END = re.compile(r"\S[ \n]")  # byte-level tokenizers begin a new word there


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a corpus was made; a second call with the same recipe does nothing."""

    input: str
    valid_input: str
    valid_fraction: float
    vocab_size: int  # of a new tokenizer; 0: the default
    tokenizer: str
    end_token: str
    seq_len: int
    on_bad_text: str
    text_key: str = "text"
    ids: str = ""  # dtype of token ids made elsewhere; empty: text
    end_id: int = -1  # among them, between documents
    max_lost_text: float = 0.01  # share that the ids may not hold

    def __post_init__(self):
        if self.seq_len < 1:
            raise DataError(f"--seq_len is {self.seq_len}; expected at least 1.")
        if not 0 <= self.valid_fraction <= 1:
            raise DataError(f"--valid_fraction is {self.valid_fraction}; expected 0 to 1.")
        if not 0 <= self.max_lost_text <= 1:
            raise DataError(f"--max_lost_text is {self.max_lost_text}; expected 0 to 1.")
        if self.vocab_size >= 1 << 31:
            raise DataError(f"--vocab_size is {self.vocab_size}; ids are 32-bit integers.")
        if self.tokenizer and self.vocab_size:
            raise DataError("--vocab_size is that of a new tokenizer; --tokenizer takes one.")
        if self.ids and not (self.tokenizer or self.vocab_size):
            raise DataError("--ids needs --tokenizer, which made them, or their --vocab_size.")
        if bool(self.ids) != (self.end_id >= 0):
            raise DataError(
                "--ids and --end_id go together: the id between documents, or one no text has."
            )


class Piece(NamedTuple):
    """A document, or a part of a long one, in its split."""

    split: str
    content: str | np.ndarray
    last: bool  # of its document


class Source:
    """The documents of a recipe with the split each belongs to; can be read many times.

    Whole documents are held out if that gives both splits one. If not, as of a single text, the
    tail of every document is. `note` says so. A document of --valid_input is never one of --input.
    """

    def __init__(self, recipe: Recipe, *, vocab_size: int):
        self._recipe, self._vocab_size = recipe, vocab_size  # the latter of token ids
        if recipe.ids and recipe.end_id >= vocab_size:
            raise DataError(f"--end_id is {recipe.end_id}; expected 0 to {vocab_size - 1}.")
        self._valid = corpus.find_files(recipe.valid_input) if recipe.valid_input else []
        held_out = {path.resolve() for path in self._valid}
        files = corpus.find_files(recipe.input)
        self._train = [path for path in files if path.resolve() not in held_out]
        if not self._train:
            raise DataError(f"All files of --input={recipe.input} are held out by --valid_input.")
        held_out = self._read(self._valid, recipe.valid_input, Skipped())
        self._held_out = {_hash64(document.content) for document in held_out}
        self._tails = False
        share = recipe.valid_fraction
        if not self._valid and 0 < share < 1:
            self._tails = not self._both_splits()
        self.rule = _rule(recipe, self._tails)
        self.note = self._tails * (
            f"Too few documents to hold out whole ones: the last {100 * share:.3g}% of each is "
            f"held out{'' if recipe.ids else ', from a line end on'}.\n"
        )

    def pieces(self, skipped: Skipped, label: str, *, cut: bool = False) -> Iterator[Piece]:
        """Yield the whole input, with a progress bar over its bytes.

        Args:
            skipped: counts bad documents where the recipe, or an input's nature, allows them.
            cut: long texts come in parts, of which a byte-level tokenizer makes the same ids.
        """
        sizes = [[path.stat().st_size for path in files] for files in (self._train, self._valid)]
        before, total = sum(sizes[0]), sum(itertools.chain(*sizes))
        with tqdm.tqdm(total=total, unit="B", unit_scale=True, desc=label) as bar:
            for document in self._read(self._train, self._recipe.input, skipped):
                if self._held_out and _hash64(document.content) in self._held_out:
                    skipped.add("held out", "also a document of --valid_input")
                    continue
                yield from self._cut(document, self._split(document.content), bar, cut)
            for content, position in self._read(self._valid, self._recipe.valid_input, skipped):
                document = Document(content, before + position)
                yield from self._cut(document, [("valid", content)], bar, cut)

    def _read(
        self, files: list[pathlib.Path], pattern: str, skipped: Skipped
    ) -> Iterator[Document]:
        recipe = self._recipe
        if recipe.ids:
            form = {"dtype": recipe.ids, "end_id": recipe.end_id, "vocab_size": self._vocab_size}
            return token_ids.read_ids(files, **form)
        # The embedded corpus has bad files on purpose.
        skip = recipe.on_bad_text == "skip" or pattern == corpus.STDLIB
        counted = skipped if skip else None
        return corpus.read_documents(files, skipped=counted, text_key=recipe.text_key)

    def _split(self, content: str | np.ndarray) -> list[tuple[str, str | np.ndarray]]:
        """Return (split, content) of a document of --input, or of its head and its tail."""
        share = self._recipe.valid_fraction
        if self._tails:
            place = _tail(content, share)
            parts = ("train", content[:place]), ("valid", content[place:])
            return [part for part in parts if len(part[1])]
        chosen = not self._valid and _hash64(content) < share * 2**64
        return [("valid" if chosen else "train", content)]

    def _cut(self, document: Document, parts: list, bar: tqdm.tqdm, cut: bool) -> Iterator[Piece]:
        """Yield the parts of a document, or pieces of them; the bar moves when one is done with."""
        start, done, size = bar.n, 0, len(document.content)
        for split, content in parts:
            at = 0
            while at < len(content):
                end = _end_of_piece(content, at, cut)
                yield Piece(split, content[at:end], end == len(content))
                done, at = done + end - at, end
                bar.update(start + (document.position - start) * done // size - bar.n)

    def _both_splits(self) -> bool:
        """Return whether both splits get a whole document; reads only until that is known."""
        found = set()
        return any(
            found.add(piece.split) or len(found) == 2
            for piece in self.pieces(Skipped(), "choosing held-out documents")
        )


def _rule(recipe: Recipe, tails: bool) -> str:
    """Return what decides which documents are held out, for the manifest."""
    if recipe.valid_input or tails:
        return "tails" if tails else "those of --valid_input"
    return f"{recipe.valid_fraction} of {'ids' if recipe.ids else 'texts'} {manifest.BY_HASH}"


def _hash64(content: str | np.ndarray) -> int:
    """Return a hash below 2^64 of a document, so that equal ones are held out together."""
    digest = hashlib.sha256()
    if isinstance(content, str):
        digest.update(content.encode())
    else:
        for start in range(0, len(content), PIECE):  # a file may be one document
            digest.update(content[start : start + PIECE].astype("<u4").tobytes())
    return int.from_bytes(digest.digest()[:8])


def _tail(content: str | np.ndarray, share: float) -> int:
    """Return where the held-out tail of a document begins, in a text at a line end or a space."""
    held_out = max(1, round(len(content) * share))
    place = wanted = len(content) - held_out
    if isinstance(content, str):
        for mark in " \n":  # the latter counts more; the tail is at most twice as long as asked
            place = content.rfind(mark, max(0, wanted - held_out), wanted) + 1 or place
    return place


def _end_of_piece(content: str | np.ndarray, start: int, cut: bool) -> int:
    """Return where the piece from `start` ends: before a space or a line end, if a text is cut."""
    if isinstance(content, np.ndarray):
        return min(start + PIECE, len(content))
    found = WORD_END.search(content, start + PIECE) if cut else None
    return found.start() + 1 if found else len(content)
