# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Id streams: what tables are looked up by. "token" always exists, n-grams are declared.

`model.streams` declares hashed n-grams as "NAME=ORDER:ROWS[:HEADS]", with commas between them.
"bigram=2:65536, trigram=3:4V:2" has pairs of ids in 65,536 rows, and triples under two hash
functions. Each of those has 4 rows for each row of the vocabulary.

"NAME=ORDER:ROWS:frequent" are the frequent n-grams of 2 to ORDER tokens in the file `data.ngrams`,
which has so many. A token's id is 1 + the row of the longest that ends at it, or 0 where none does.
"""

import re
from typing import NamedTuple

from jtok_jax.checks import names
from jtok_jax.errors import ConfigError

FREQUENT = "frequent"
MOST_FREQUENT = 500_000_000
_DECLARED = re.compile(rf"([a-z][a-z0-9_]*)=(\d+):(\d+)(V?)(?::(\d+|{FREQUENT}))?")


class IdStream(NamedTuple):
    """An id in [0, rows x heads) for every token and head, a function of the last `order` ids."""

    name: str
    order: int  # 1: the token itself
    rows: int  # of one head
    heads: int = 1  # hash functions, each with rows of its own
    document_id: int = -1  # token that begins a document, before which nothing is read; -1: none
    frequent: bool = False  # rows are of n-grams in a file, and no hash
    vocab_rows: int = 0  # of the embedding

    @property
    def num_rows(self) -> int:
        """Return how many rows of a table this stream looks up."""
        return self.rows * self.heads + self.frequent  # and one for no frequent n-gram


def parse_streams(text: str, vocab_rows: int, document_id: int = -1) -> dict[str, IdStream]:
    """Return the streams that `model.streams` declares, by name, "token" among them.

    Args:
        vocab_rows: rows of the embedding, padding included: those of "token", and the unit "V".
        document_id: of every n-gram.

    Raises:
        ConfigError: a declaration is no such, a name comes twice, a number is below its minimum.
    """
    streams = {"token": IdStream("token", 1, vocab_rows)}
    for part in names(text):
        match = _DECLARED.fullmatch(part)
        if not match:
            raise ConfigError(
                f"model.streams has {part!r}; expected NAME=ORDER:ROWS or NAME=ORDER:ROWS:HEADS, "
                "such as bigram=2:65536 (4V rows: 4 for each of the vocabulary), or "
                "NAME=ORDER:ROWS:frequent."
            )
        name, order, rows, unit, heads = match.groups()
        frequent = heads == FREQUENT
        if name in streams:
            raise ConfigError(f"model.streams declares {name!r} twice, or it is the token's own.")
        rows = int(rows) * (vocab_rows if unit else 1)
        heads = 1 if frequent else int(heads or 1)
        found = IdStream(name, int(order), rows, heads, document_id, frequent, vocab_rows)
        for what, value, least in (("order", found.order, 2), ("rows", rows, 1),
                                   ("heads", found.heads, 1)):  # fmt: skip
            if value < least:
                raise ConfigError(
                    f"model.streams: {what} of {name} is {value}; expected at least {least}."
                )
        if found.num_rows >= 1 << 31:
            raise ConfigError(f"model.streams: {name} has {found.num_rows} rows; ids are int32.")
        if frequent and rows > MOST_FREQUENT:
            raise ConfigError(
                f"model.streams: {name} has {rows} rows; at most {MOST_FREQUENT} frequent n-grams "
                "can be found, whose places in an index are int32."
            )
        streams[name] = found
    return streams
