# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Tables in files of a folder, mapped into memory: one process writes them, or several read them.

FOLDER/<table>.<leaf>.npy   rows, or what their optimizer keeps: as `store.rows` has them by rows
FOLDER/drawn.<stream>.npy   bool, which rows were ever written; the others are holes in the files
FOLDER/tables.json          whose they are; and once all is written the size and time of each file

bfloat16 is stored as words of 16 bits: the format has no name for it.
"""

import contextlib
import fcntl
import json
import mmap
import os
import pathlib
import weakref
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jtok_jax.errors import CheckpointError, WorkdirError
from jtok_jax.lock import LOCK_FILE, locked

MANIFEST = "tables.json"


class Contents(NamedTuple):
    """Says whose arrays a folder holds: for people, and in plain values to compare."""

    description: str
    identity: dict[str, object]


class MappedFolder:
    """The arrays of a folder.

    arrays: by name, NumPy arrays over the files. is_published: all is written, and only read.
    """

    def __init__(
        self,
        path: pathlib.Path,
        shapes: Mapping[str, jax.ShapeDtypeStruct],
        contents: Contents,
    ):
        """Open the arrays of `contents` if all of them are there, else make sparse ones of zeros.

        Raises:
            CheckpointError: the folder holds other arrays, or damaged ones.
            WorkdirError: another process writes or reads there, or it cannot be written.
        """
        self.path, self._shapes, self._contents = path, dict(shapes), contents
        self._open_files = contextlib.ExitStack()
        manifest = self._read_manifest()
        if manifest is None and any(path.glob("*.npy")):
            raise WorkdirError(f"{path} has arrays that are no run's tables. Pass another folder.")
        if manifest is not None and manifest["identity"] != contents.identity:
            raise CheckpointError(
                f"{path} holds the tables of {manifest['description']}, and those of "
                f"{contents.description} are wanted. Nothing was changed. Pass another folder, or "
                "remove that one."
            )
        self.is_published = bool(manifest and manifest["files"])
        self._lock = self._open_files.enter_context(
            locked(path / LOCK_FILE, shared=self.is_published, option="table_folder")
        )
        if self._read_manifest() != manifest:
            raise WorkdirError(f"{path} was written by another process just now; try again.")
        weakref.finalize(self, self._open_files.close)
        try:
            if not self.is_published:
                self._write_manifest({})
            self._open("r" if self.is_published else "w+")
        except OSError as error:
            raise WorkdirError(f"{path} cannot be written: {error}.") from error
        if self.is_published and manifest["files"] != self._stats:
            raise CheckpointError(
                f"Files of {path} were changed since they were written. Remove that folder; then "
                "it is made anew."
            )

    def publish(self) -> None:
        """Say that all arrays are written, and let others read them from now on."""
        try:
            for array in self._files.values():
                array.flush()
            self.is_published = True
            self._open("r")
            self._write_manifest(self._stats)
        except OSError as error:
            raise WorkdirError(f"{self.path} cannot be written: {error}.") from error
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def reserve(self, name: str, ids: np.ndarray) -> None:
        """Take room on the disk for rows of an array; ids ascend, each is there once.

        Written through a map, a row for which there is none would end the process by SIGBUS.

        Raises WorkdirError: there is no room.
        """
        if not len(ids):
            return
        file, size = self._files[name], self.arrays[name][0].nbytes
        ends = np.flatnonzero(np.diff(ids) > 1)  # of runs without a gap
        firsts, lasts = ids[np.append(0, ends + 1)], ids[np.append(ends, len(ids) - 1)]
        try:
            for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
                place = file.offset + first * size
                os.posix_fallocate(self._descriptors[name], place, (last - first + 1) * size)
        except OSError as error:
            whole = sum(array.nbytes for array in self.arrays.values()) / 2**30
            raise WorkdirError(
                f"{self.path} has no room for more rows: {error}. With all of them its files take "
                f"{whole:.1f} GiB. The last checkpoint is intact: free space, or pass another "
                "folder, and run the same command again."
            ) from error

    @contextlib.contextmanager
    def read_ahead(self) -> Iterator[None]:
        """While this lasts, let the system read ahead in the files."""
        self._advise(mmap.MADV_NORMAL)
        try:
            yield
        finally:
            self._advise(mmap.MADV_RANDOM)  # else rows are read with all that is around them

    def _advise(self, advice: int) -> None:
        for file in self._files.values():
            file._mmap.madvise(advice)

    def check(self) -> None:
        """Raise CheckpointError if a file is not what it was: reading on could end the process."""
        for name, manifest in self._stats.items():
            if manifest != self._stat(name):
                raise CheckpointError(
                    f"{self._file(name)} was changed while it was mapped. Remove {self.path}; "
                    "then its files are made anew."
                )

    def close(self) -> None:
        """Let others write there. The arrays must not be used any more."""
        self._open_files.close()

    def _read_manifest(self) -> dict | None:
        """Return what the folder says of its arrays: "description", "identity", "files"."""
        try:
            found = json.loads((self.path / MANIFEST).read_text())
            return {name: found[name] for name in ("description", "identity", "files")}
        except FileNotFoundError:
            return None
        except NotADirectoryError as error:
            raise WorkdirError(f"{self.path} is no folder.") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.path / MANIFEST} is damaged; remove {self.path}."
            ) from error

    def _write_manifest(self, files: dict[str, list[int]]) -> None:
        partial = self.path / f"{MANIFEST}.partial"
        partial.write_text(json.dumps(self._contents._asdict() | {"files": files}))
        partial.rename(self.path / MANIFEST)

    def _file(self, name: str) -> pathlib.Path:
        return self.path / f"{name.replace('/', '.')}.npy"

    def _open(self, mode: str) -> None:
        self.arrays, self._files, self._descriptors, self._stats = {}, {}, {}, {}
        for name, wanted in self._shapes.items():
            path, is_words = self._file(name), wanted.dtype == jnp.bfloat16
            dtype = np.dtype(np.uint16 if is_words else wanted.dtype)
            try:
                file = np.lib.format.open_memmap(path, mode, dtype, wanted.shape)
                descriptor = os.open(path, os.O_RDONLY if mode == "r" else os.O_RDWR)
            except (ValueError, FileNotFoundError) as error:
                raise CheckpointError(
                    f"{path} cannot be mapped: {error}. Remove {self.path}; then it is made anew."
                ) from error
            self._open_files.callback(os.close, descriptor)
            if (file.shape, file.dtype) != (wanted.shape, dtype):
                raise CheckpointError(
                    f"{path} holds {file.dtype} {list(file.shape)}, of {dtype} "
                    f"{list(wanted.shape)}. Remove {self.path}; then it is made anew."
                )
            self._files[name], self._descriptors[name] = file, descriptor
            array = np.asarray(file)
            self.arrays[name] = array.view(jnp.bfloat16) if is_words else array
            self._stats[name] = self._stat(name)
            if mode != "r" and array.dtype == bool:  # small, and written without `reserve`
                self.reserve(name, np.arange(len(array)))
        self._advise(mmap.MADV_RANDOM)

    def _stat(self, name: str) -> list[int]:
        """Return the size of a file; and when it was changed, if it is not to be any more."""
        found = os.fstat(self._descriptors[name])
        return [found.st_size, found.st_mtime_ns if self.is_published else 0]
