# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Windows of token ids in ArrayRecord shards: the writer, and a random-access reader."""

import contextlib
import pathlib
import resource
from collections.abc import Iterator, Sequence

import array_record.python.array_record_module as array_record
import grain
import numpy as np

from jtok_jax.data.manifest import Manifest, Shard, Split, file_sha256
from jtok_jax.errors import DataError

SHARD_BYTES = 256 << 20
OTHER_FILES = 64, 1024  # open beside the shards: fewest, and what is asked for


class WindowWriter:
    """Cuts a stream of ids into windows of seq_len + 1, neighbours sharing one id.

    The stream starts with the end token, so every id of every document is a target once.
    """

    def __init__(self, folder: pathlib.Path, split: str, *, seq_len: int, dtype: str, end_id: int):
        self._folder, self._split, self._seq_len, self._end_id = folder, split, seq_len, end_id
        self._stream = np.array([end_id], dtype)  # the last id written, and those after it
        self._windows_per_shard = max(1, SHARD_BYTES // ((seq_len + 1) * self._stream.itemsize))
        self._writer, self._in_shard, self._shards = None, 0, []
        self._targets = self._documents = self._text_bytes = 0

    def add(self, ids: Sequence[int], *, text_bytes: int, last: bool = True) -> None:
        """Append ids of a document, and the end token after its last ones."""
        parts = self._stream, ids, [self._end_id] * last
        self._stream = np.concatenate([np.asarray(part, self._stream.dtype) for part in parts])
        self._documents += last
        self._text_bytes += text_bytes
        while len(self._stream) > self._seq_len:
            self._write(self._stream[: self._seq_len + 1], targets=self._seq_len)
            self._stream = self._stream[self._seq_len :]

    def close(self, *, pad_tail: bool) -> Split:
        """Finish the split; its tail is padded with the end token or dropped."""
        tail = len(self._stream) - 1
        if pad_tail and tail:
            padding = (0, self._seq_len - tail)
            self._write(np.pad(self._stream, padding, constant_values=self._end_id), targets=tail)
        self._close_shard()
        return Split(
            shards=tuple(self._shards),
            windows=sum(shard.windows for shard in self._shards),
            targets=self._targets,
            documents=self._documents,
            text_bytes=self._text_bytes,
            dropped_ids=0 if pad_tail else tail,
        )

    def _write(self, window: np.ndarray, *, targets: int) -> None:
        if self._writer is None:
            name = f"{self._split}-{len(self._shards):05d}.array_record"
            self._path = self._folder / name
            self._writer = array_record.ArrayRecordWriter(str(self._path), "group_size:1")
        with _disk_errors():
            self._writer.write(window.tobytes())
        self._in_shard += 1
        self._targets += targets
        if self._in_shard == self._windows_per_shard:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        with _disk_errors():
            self._writer.close()
        size, digest = self._path.stat().st_size, file_sha256(self._path)
        self._shards.append(Shard(self._path.name, size, digest, self._in_shard))
        self._writer, self._in_shard = None, 0


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """Raise what ArrayRecord says of a full disk as the OSError it is."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error


class Windows:
    """Random access to one split as sequences of `seq_len` targets.

    `seq_len` may be shorter than the prepared windows if it divides their length.
    """

    def __init__(self, folder: pathlib.Path, manifest: Manifest, split: str, *, seq_len: int):
        if manifest.seq_len % seq_len:
            raise DataError(
                f"train.seq_len is {seq_len} but {folder} holds windows of {manifest.seq_len}; "
                "use a length that divides it, or prepare again with --seq_len."
            )
        self.split: Split = getattr(manifest, split)
        if not self.split.windows:
            raise DataError(
                f"The {split} split of {folder} holds no window of {manifest.seq_len} tokens; "
                "prepare it from more text or with a shorter --seq_len."
            )
        # With its windows in the name a shard need not be opened to know how many it has.
        shards = [f"{folder / shard.name}[0:{shard.windows}]" for shard in self.split.shards]
        self._source = grain.sources.ArrayRecordDataSource(shards)
        self._folder = folder
        self.seq_len = seq_len
        self._parts = manifest.seq_len // seq_len
        self._dtype = np.dtype(manifest.dtype)

    def __len__(self) -> int:
        return self.split.windows * self._parts

    def __getitem__(self, index: int) -> np.ndarray:
        """Return sequence `index` as int32 ids [seq_len + 1]."""
        record, part = divmod(index, self._parts)
        try:
            ids = np.frombuffer(self._source[record], self._dtype)
        except RuntimeError as error:  # what ArrayRecord raises at a wrong checksum
            raise DataError(
                f"A shard in {self._folder} is damaged: {error}. Fetch it again, or prepare the "
                "corpus again."
            ) from error
        start = part * self.seq_len
        return ids[start : start + self.seq_len + 1].astype(np.int32)

    def locate(self, index: int) -> str:
        """Return 'shard record position' of the first id of sequence `index`, for messages."""
        record, part = divmod(index, self._parts)
        for shard in self.split.shards:
            if record < shard.windows:
                return f"{shard.name} record {record} from position {part * self.seq_len}"
            record -= shard.windows
        raise IndexError(index)


def allow_open_files(shards: int) -> None:
    """Raise this process's limit of open files: a reader keeps every shard open.

    Raises DataError: the machine allows fewer.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fewest, wanted = (shards + others for others in OTHER_FILES)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted >= fewest:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(wanted, fewest), hard))
    except (ValueError, OSError) as error:
        raise DataError(
            f"{shards} shards are kept open, this machine allows {hard} files a process (ulimit "
            f"-Hn). Allow {fewest} or more; corpora prepared anew have shards of "
            f"{SHARD_BYTES >> 20} MiB, and another fingerprint."
        ) from error
