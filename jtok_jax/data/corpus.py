# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Documents out of text, JSON lines (both plain, .gz, .xz or .zst) and Parquet files."""

import collections
import contextlib
import dataclasses
import glob
import gzip
import io
import itertools
import json
import lzma
import pathlib
import sysconfig
import zlib
from collections.abc import Iterator
from typing import IO

import pyarrow
import pyarrow.parquet

from jtok_jax.errors import DataError

STDLIB = "stdlib"  # the embedded corpus: the source code of Python's own standard library


@dataclasses.dataclass
class Skipped:
    """What was left out and why; printed, and counted in the manifest."""

    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, reason: str, message: str) -> None:
        self.counts[reason] += 1
        self.examples.setdefault(reason, message)

    def describe(self) -> list[str]:
        return [f"skipped {n} ({why}), e.g. {self.examples[why]}" for why, n in self.counts.items()]


class BadText(Exception):
    """A document that is not text; its arguments are the reason's name and the message."""


def find_files(pattern: str) -> list[pathlib.Path]:
    """Return the files of a glob pattern or of STDLIB by name. Raises DataError if none matches."""
    if pattern == STDLIB:
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        others = {"site-packages", "dist-packages"}
        files = [path for path in root.rglob("*.py") if not others & {*path.parts}]
    else:
        files = [pathlib.Path(name) for name in glob.glob(pattern, recursive=True)]
    files = sorted(path for path in files if path.is_file())
    if not files:
        raise DataError(f"No file matches {pattern!r}. Quote the pattern and check the folder.")
    return files


def read_documents(
    files: list[pathlib.Path], *, skipped: Skipped | None, on_file=lambda path: None
) -> Iterator[str]:
    """Yield the text of every document of `files` in order.

    Args:
        skipped: takes empty and badly encoded documents; None refuses them.
        on_file: called with each path after it has been read.

    Raises DataError: an empty or non-UTF-8 document with `skipped` None, or a damaged file.
    """
    for path in files:
        with _readable(path):
            for origin, content in _contents(path):
                try:
                    yield _text(origin, content)
                except BadText as error:
                    reason, message = error.args
                    if skipped is None:
                        advice = "Use --on-bad-text=skip to drop and count such documents."
                        raise DataError(f"{message} {advice}") from error
                    skipped.add(reason, message)
        on_file(path)


def _text(origin: str, content: bytes | str) -> str:
    try:
        if isinstance(content, str):
            content.encode("utf-8")
        else:
            content = content.decode("utf-8")
            if "\0" in content:  # token ids, archives; JSON and Parquet say themselves what is text
                where = f"NUL at character {content.index(chr(0)):,}"
                raise BadText("binary", f"{origin}: binary, not text: {where}.")
    except UnicodeDecodeError as error:
        where = f"byte {error.start:,} (0x{content[error.start]:02x})"
        raise BadText("not UTF-8", f"{origin}: invalid UTF-8 at {where}.") from error
    except UnicodeEncodeError as error:
        where = f"character {error.start:,}"
        raise BadText("not UTF-8", f"{origin}: lone surrogate at {where}.") from error
    if not content:
        raise BadText("empty", f"{origin}: empty document.")
    return content


def _contents(path: pathlib.Path) -> Iterator[tuple[str, bytes | str]]:
    """Yield (origin, raw content) of each document in one file."""
    *_, before, suffix = "", "", *(suffix.lower() for suffix in path.suffixes)
    kind = before if suffix in (".gz", ".xz", ".zst") else suffix
    if suffix == ".parquet":
        yield from _parquet(path)
    elif kind in (".jsonl", ".ndjson", ".json"):
        yield from _jsonl(path)
    else:
        with _open(path) as stream:
            yield str(path), stream.read()


def _open(path: pathlib.Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".zst":  # pyarrow notices a stream that ends early
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    openers = {".gz": gzip.open, ".xz": lzma.open}
    return openers.get(suffix, open)(path, "rb")


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    """Turn the many errors of damaged files into one a user understands."""
    try:
        yield
    except (EOFError, OSError, lzma.LZMAError, zlib.error, pyarrow.ArrowInvalid) as error:
        raise DataError(
            f"{path}: cannot be read to its end ({error}). If that is not a matter of permissions "
            "it is likely an interrupted copy; fetch it again."
        ) from error


def _jsonl(path: pathlib.Path) -> Iterator[tuple[str, bytes | str]]:
    number = 0
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield f"{path}:{number}", _text_field(f"{path}:{number}", line)
    if number == 0:
        yield str(path), ""


def _text_field(origin: str, line: bytes) -> bytes | str:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return line  # reported as bad text with the byte's place
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}: not JSON ({error}). Each line is one object.") from error
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise DataError(f'{origin}: no string under "text". Each line is one object.')
    return record["text"]


def _parquet(path: pathlib.Path) -> Iterator[tuple[str, str]]:
    with pyarrow.parquet.ParquetFile(path) as table:
        if "text" not in table.schema_arrow.names:
            raise DataError(f'{path}: no column "text"; it has {table.schema_arrow.names}.')
        kind = table.schema_arrow.field("text").type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(f'{path}: column "text" holds {kind}; expected strings.')
        batches = (batch.column(0).to_pylist() for batch in table.iter_batches(columns=["text"]))
        for row, text in enumerate(itertools.chain.from_iterable(batches)):
            yield f"{path}:{row}", text or ""
