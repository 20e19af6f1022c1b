# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The documents of a corpus to prepare, each in its split."""

import dataclasses
import hashlib
from collections.abc import Iterator

import tqdm

from jtok_jax.data import corpus
from jtok_jax.data.corpus import Skipped
from jtok_jax.errors import DataError


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

    def __post_init__(self):
        if self.seq_len < 1:
            raise DataError(f"--seq_len is {self.seq_len}; expected at least 1.")
        if not 0 <= self.valid_fraction <= 1:
            raise DataError(f"--valid_fraction is {self.valid_fraction}; expected 0 to 1.")
        if self.vocab_size >= 1 << 31:
            raise DataError(f"--vocab_size is {self.vocab_size}; ids are 32-bit integers.")
        if self.tokenizer and self.vocab_size:
            raise DataError("--vocab_size is that of a new tokenizer; --tokenizer takes one.")


class Source:
    """The documents of a recipe with the split each belongs to; can be read many times.

    Whole documents are held out if that gives both splits one. If not, as of a single text, the
    tail of every document is. `note` says so.
    """

    def __init__(self, recipe: Recipe):
        self._recipe = recipe
        self._valid = corpus.find_files(recipe.valid_input) if recipe.valid_input else []
        held_out = {path.resolve() for path in self._valid}
        files = corpus.find_files(recipe.input)
        self._train = [path for path in files if path.resolve() not in held_out]
        if not self._train:
            raise DataError(f"All files of --input={recipe.input} are held out by --valid_input.")
        self._tails = False
        share = recipe.valid_fraction
        if not self._valid and 0 < share < 1:
            self._tails = not self._both_splits()
        self.note = self._tails * (
            f"Too few documents to hold out whole ones: the last {share:.3g} of each is held out, "
            "from a line end on.\n"
        )

    def documents(self, skipped: Skipped, label: str) -> Iterator[tuple[str, str]]:
        """Yield (split, text) of the whole input, with a progress bar over its bytes.

        Bad documents are counted in `skipped` where the recipe, or an input's nature, allows it.
        """
        total = sum(path.stat().st_size for path in (*self._train, *self._valid))
        with tqdm.tqdm(total=total, unit="B", unit_scale=True, desc=label) as bar:
            recipe = self._recipe
            for files, pattern in ((self._train, recipe.input), (self._valid, recipe.valid_input)):
                # The embedded corpus has bad files on purpose.
                skip = recipe.on_bad_text == "skip" or pattern == corpus.STDLIB
                counted = skipped if skip else None
                before = bar.n
                found = corpus.read_documents(files, skipped=counted, text_key=recipe.text_key)
                for text, position in found:
                    bar.update(before + position - bar.n)
                    if self._tails:
                        yield from _with_tail(text, recipe.valid_fraction)
                    else:
                        held_out = files is self._valid or (not self._valid and self._chosen(text))
                        yield "valid" if held_out else "train", text

    def _both_splits(self) -> bool:
        """Return whether both splits get a whole document; reads only until that is known."""
        found = set()
        return any(
            found.add(split) or len(found) == 2
            for split, _ in self.documents(Skipped(), "choosing held-out documents")
        )

    def _chosen(self, text: str) -> bool:
        """Return whether a text is held out: by its own hash, so equal texts are together."""
        digest = hashlib.sha256(text.encode()).digest()
        return int.from_bytes(digest[:8]) < self._recipe.valid_fraction * 2**64


def _with_tail(text: str, share: float) -> Iterator[tuple[str, str]]:
    """Yield a text up to its held-out tail, and that tail."""
    held_out = max(1, round(len(text) * share))
    cut = wanted = len(text) - held_out
    for mark in " \n":  # at a line end, else a space, that makes the tail at most twice as long
        cut = text.rfind(mark, max(0, wanted - held_out), wanted) + 1 or cut
    for split, part in (("train", text[:cut]), ("valid", text[cut:])):
        if part:
            yield split, part
