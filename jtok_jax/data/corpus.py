# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Documents out of text and JSON (both plain, .gz, .xz or .zst) and Parquet files.

A reader of a format takes an open file and yields (origin, content, bytes of the file read).
"""

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
import shutil
import subprocess
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from typing import IO, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from jtok_jax.errors import DataError

IDS_SUFFIXES = (".bin", ".npy", ".idx")  # of files of token ids
COMPRESSED = (".gz", ".xz", ".zst")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
LONG_WINDOW = "too much memory"  # in the error of zstd
STDLIB = "stdlib"  # the embedded corpus: the source code of Python's own standard library


@dataclasses.dataclass
class Skipped:
    """Counts what was left out and why; printed, and kept in the manifest."""

    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    examples: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, reason: str, message: str) -> None:
        """Count one thing that was left out; the first message of a reason is kept."""
        self.counts[reason] += 1
        self.examples.setdefault(reason, message)

    def describe(self) -> list[str]:
        """Return a line for each reason."""
        return [f"skipped {n} ({why}), e.g. {self.examples[why]}" for why, n in self.counts.items()]


class Document(NamedTuple):
    """The text, or token ids, of one document and the bytes of all files read up to its end."""

    content: str | np.ndarray
    position: int


class Opened(NamedTuple):
    """A file to read documents from: `raw` counts its bytes, `stream` holds them decompressed."""

    path: pathlib.Path
    raw: io.FileIO
    stream: IO[bytes]
    text_key: str  # of JSON objects, or a column


Contents = Iterator[tuple[str, bytes | str, int]]  # of one file: origin, content, bytes read


class BadText(Exception):
    """A document that is not text; its arguments are the reason's name and the message."""


def find_files(pattern: str) -> list[pathlib.Path]:
    """Return the files of a glob pattern, a folder, or STDLIB. Raises DataError if there is none.

    Hidden files of a folder, and those in hidden folders, are left out.
    """
    named = pathlib.Path(pattern)
    if pattern == STDLIB:
        root = pathlib.Path(sysconfig.get_path("stdlib"))
        others = {"site-packages", "dist-packages"}
        files = [path for path in root.rglob("*.py") if not others & {*path.parts}]
    elif named.is_dir():
        hidden = lambda path: any(part[0] == "." for part in path.relative_to(named).parts)
        files = [path for path in named.rglob("*") if not hidden(path)]
    else:
        files = map(pathlib.Path, glob.glob(pattern, recursive=True))
    files = sorted(path for path in files if path.is_file())
    if not files:
        raise DataError(f"No file matches {pattern!r} here; check the folder and the name.")
    return files


def read_documents(
    files: list[pathlib.Path], *, skipped: Skipped | None, text_key: str = "text"
) -> Iterator[Document]:
    """Yield every document of `files` in order.

    Args:
        skipped: takes empty and badly encoded documents; None refuses them.
        text_key: key of JSON objects, or column of Parquet, that holds the text.

    Raises DataError: an empty or non-UTF-8 document with `skipped` None, or a damaged file.
    """
    before = 0
    for path in files:
        for origin, content, position in _contents(path, text_key):
            try:
                yield Document(_text(origin, content), before + position)
            except BadText as error:
                reason, message = error.args
                if path.suffix in IDS_SUFFIXES and reason != "empty":
                    raise DataError(
                        f"{message}\nIt looks like token ids: pass --ids=uint16, or their dtype."
                    ) from error
                if skipped is None:
                    advice = "Use --on_bad_text=skip to drop and count such documents."
                    raise DataError(f"{message} {advice}") from error
                skipped.add(reason, message)
        before += path.stat().st_size


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


def _contents(path: pathlib.Path, text_key: str) -> Contents:
    *_, before, suffix = "", "", *(suffix.lower() for suffix in path.suffixes)
    kind = before if suffix in COMPRESSED else suffix
    reader = READERS.get(kind, _whole_text)
    with (
        _readable(path),
        path.open("rb", buffering=0) as raw,
        _decompressed(path, raw) as stream,
    ):
        yield from reader(Opened(path, raw, stream, text_key))


def _whole_text(file: Opened) -> Contents:
    content = file.stream.read().removeprefix(BYTE_ORDER_MARK)
    yield str(file.path), content, file.raw.tell()


def _json_lines(file: Opened) -> Contents:
    number = 0
    for number, line in enumerate(file.stream, start=1):
        origin = f"{file.path}:{number}"
        if line.strip():
            yield origin, _text_of_line(origin, line, file.text_key), file.raw.tell()
    if number == 0:
        yield str(file.path), "", 0


def _json(file: Opened) -> Contents:
    """Yield the texts of one JSON array, or of JSON lines under the same name."""
    start = file.stream.peek(64).removeprefix(BYTE_ORDER_MARK)
    if not start.lstrip().startswith(b"["):
        yield from _json_lines(file)
        return
    try:
        records = json.loads(file.stream.read())
    except ValueError as error:
        raise DataError(f"{file.path}: not a JSON array ({error}).") from error
    for index, record in enumerate(records):
        origin = f"{file.path}[{index}]"
        position = file.raw.tell() * (index + 1) // len(records)
        yield origin, _text_of(origin, record, file.text_key), position
    if not records:
        yield str(file.path), "", 0


def _text_of_line(origin: str, line: bytes, text_key: str) -> bytes | str:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        return line  # reported as bad text with the byte's place
    except json.JSONDecodeError as error:
        raise DataError(f"{origin}: not JSON ({error}). Each line is one object.") from error
    return _text_of(origin, record, text_key)


def _text_of(origin: str, record: object, text_key: str) -> str:
    """Return the text of an object or a string. A null is an empty document, as in Parquet."""
    text = record.get(text_key, 0) if isinstance(record, dict) else record
    if text is None or isinstance(text, str):
        return text or ""
    keys = f" {_list_keys(record)}" if isinstance(record, dict) else ""
    raise DataError(f'{origin}: no string under "{text_key}".{keys}')


def _list_keys(names: Iterable[str]) -> str:
    return f"Its keys: {', '.join(names)}. Name that of the text with --text_key=KEY."


def _parquet(file: Opened) -> Contents:
    key, types = file.text_key, pyarrow.types
    with pyarrow.parquet.ParquetFile(file.path) as table:
        if key not in table.schema_arrow.names:
            names = _list_keys(table.schema_arrow.names)
            raise DataError(f'{file.path}: no column "{key}". {names}')
        kind = table.schema_arrow.field(key).type
        values = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(values) or types.is_large_string(values)):
            raise DataError(f'{file.path}: column "{key}" holds {kind}; expected strings.')
        batches = (batch.column(0).to_pylist() for batch in table.iter_batches(columns=[key]))
        size, rows = file.path.stat().st_size, table.metadata.num_rows
        for row, text in enumerate(itertools.chain.from_iterable(batches)):
            yield f"{file.path}:{row}", text or "", size * (row + 1) // rows


READERS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".parquet": _parquet,
}


@contextlib.contextmanager
def _decompressed(path: pathlib.Path, raw: io.FileIO) -> Iterator[IO[bytes]]:
    """Yield the contents of `raw`, which stays open: its position counts the bytes read."""
    suffix = path.suffix.lower()
    if suffix == ".zst":
        own = io.FileIO(raw.fileno(), closefd=False)  # it closes what it reads
        # It notices an early end, and refuses long windows.
        stream = io.BufferedReader(pyarrow.input_stream(own, compression="zstd"))
        try:
            stream.peek(1)
        except OSError as error:
            if LONG_WINDOW not in str(error):
                raise
            raw.seek(0)
            with _zstd_program(path, raw) as stream:
                yield stream
            return
        yield stream
    else:
        openers = {".gz": gzip.open, ".xz": lzma.open}
        yield openers.get(suffix, io.BufferedReader)(raw)


@contextlib.contextmanager
def _zstd_program(path: pathlib.Path, raw: io.FileIO) -> Iterator[IO[bytes]]:
    """Yield the contents of a zstd file with a window of up to 2 GiB, by the program zstd."""
    program = shutil.which("zstd")
    if program is None:
        raise DataError(
            f"{path}: compressed with a window over 128 MiB (zstd --long). Only the program zstd "
            "reads that, and it is not installed here. Install it and prepare again."
        )
    pipes = {"stdin": raw, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([program, "-dc", "--long=31"], **pipes) as process:
        try:
            yield process.stdout
        except BaseException:
            process.kill()
            raise
        message = process.stderr.read().decode(errors="replace").strip()
        if process.wait():
            raise OSError(message)


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
