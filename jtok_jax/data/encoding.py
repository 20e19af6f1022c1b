# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Text into token ids, judged by the ids: no end of document inside a text, and what is lost."""

import collections
import itertools

import tokenizers

from jtok_jax.data.manifest import lost_share
from jtok_jax.data.tokenizer import token_bytes, unknown_id
from jtok_jax.errors import DataError

ENOUGH = 1 << 20  # bytes after which too large a loss ends a preparation before its end


def encode_text(tokenizer: tokenizers.Tokenizer, text: str, end_id: int) -> list[int]:
    """Return the ids of a text; where it spells the end token, it is cut inside of that.

    Raises DataError: `end_id` also stands for single characters.
    """
    encoding = tokenizer.encode(text, add_special_tokens=False)
    if end_id not in encoding.ids:
        return encoding.ids
    pairs = zip(encoding.ids, encoding.offsets, strict=True)
    spelled = [place for one, place in pairs if one == end_id]
    if any(stop - start < 2 for start, stop in spelled):
        raise DataError(
            f"The end token {tokenizer.id_to_token(end_id)!r} is also a character of the text, or "
            "unknown ones.\nTake another --end_token, one that no text is encoded to."
        )
    cuts = [0, *(start + 1 for start, _ in spelled), len(text)]
    parts = [text[start:stop] for start, stop in itertools.pairwise(cuts)]
    return [one for part in parts for one in encode_text(tokenizer, part, end_id)]


class TextEncoder:
    """A tokenizer that counts what its ids hold of the text, in `counts` of each split.

    tokens: ids. unknown: of these, the unknown token. bytes: of the text. lost: bytes that differ
    from what the ids decode to. ends: end tokens that the text spells.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, end_id: int, *, max_lost: float):
        self._tokenizer, self._end_id, self._max_lost = tokenizer, end_id, max_lost
        self._unknown, self._bytes = unknown_id(tokenizer), token_bytes(tokenizer)
        if self._bytes and self._unknown is not None:
            self._bytes[self._unknown] = b""  # as `decode` does
        self._end_token = tokenizer.id_to_token(end_id)
        self.counts = {"train": collections.Counter(), "valid": collections.Counter()}

    def encode(self, splits: list[str], texts: list[str]) -> list[list[int]]:
        """Return the ids of each text. Raises DataError: too much of the texts so far is lost."""
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception
            raise DataError(f"The tokenizer does not encode the text: {error}.") from error
        found = [encoding.ids for encoding in encodings]
        for index, ids in enumerate(found):
            if self._end_id in ids:
                found[index] = encode_text(self._tokenizer, texts[index], self._end_id)
        lost = self._lost(texts, found)
        for split, text, ids, missing in zip(splits, texts, found, lost, strict=True):
            ends = text.count(self._end_token)
            self._count(split, ids, bytes=len(text.encode()), lost=missing, ends=ends)
        self.check(ENOUGH)
        return found

    def _lost(self, texts: list[str], found: list[list[int]]) -> list[int]:
        """Return the bytes that each text and what its ids decode to do not have in common."""
        pairs = list(zip(texts, found, strict=True))
        if self._bytes:  # twice as fast as decoding all
            join = lambda ids: b"".join(map(self._bytes.__getitem__, ids))
            same = [join(ids) == text.encode() for text, ids in pairs]
        else:
            same = [False] * len(pairs)
        others = [ids for (_, ids), equal in zip(pairs, same, strict=True) if not equal]
        decoded = iter(self.decode(others))
        return [
            0 if equal else _difference(text, next(decoded))
            for text, equal in zip(texts, same, strict=True)
        ]

    def measure(self, split: str, ids: list[int]) -> int:
        """Return the bytes of the text that ids made elsewhere decode to."""
        size = len(self.decode([ids])[0].encode())
        self._count(split, ids, bytes=size)
        return size

    def decode(self, batch: list[list[int]]) -> list[str]:
        """Return the text the ids hold: what is unknown is left out."""
        if self._unknown is not None:
            batch = [[one for one in ids if one != self._unknown] for ids in batch]
        return self._tokenizer.decode_batch(batch, skip_special_tokens=False)

    def check(self, enough: int = 0) -> None:
        """Refuse a tokenizer that loses too much of at least `enough` bytes of a split."""
        for split, counts in self.counts.items():
            share = lost_share(counts)
            if share > self._max_lost and counts["bytes"] >= enough:
                raise DataError(
                    f"The tokenizer loses {share:.2%} of the {split} text; expected at most "
                    f"{self._max_lost:.2%}, --max_lost_text.\n{self.describe(split)}\n"
                    "Take another --tokenizer. A higher --max_lost_text accepts this one."
                )

    def describe(self, split: str) -> str:
        """Return what the ids hold of a split, in a line."""
        counts = self.counts[split]
        shares = [
            100 * counts[part] / max(1, counts[whole])
            for part, whole in (("unknown", "tokens"), ("lost", "bytes"))
        ]
        ends = f"; it spells {self._end_token!r} {counts['ends']:,} times, kept as text"
        return (
            f"  {split}: {shares[0]:.3g}% of tokens unknown, {shares[1]:.3g}% of text lost"
            f"{ends if counts['ends'] else ''}"
        )

    def _count(self, split: str, ids: list[int], **more: int) -> None:
        unknown = 0 if self._unknown is None else ids.count(self._unknown)
        self.counts[split].update(tokens=len(ids), unknown=unknown, **more)


def _difference(text: str, other: str) -> int:
    """Return how many UTF-8 bytes of either text the other lacks, wherever they stand."""
    if text == other:
        return 0
    ours, theirs = collections.Counter(text), collections.Counter(other)
    size = lambda counter: sum(len(char.encode()) * count for char, count in counter.items())
    return min(len(text.encode()), max(size(ours - theirs), size(theirs - ours)))
