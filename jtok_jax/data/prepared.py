# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Checks prepared corpora before a run reads them: one alone, and several that are mixed."""

import pathlib

from jtok_jax.config import Config
from jtok_jax.data import manifest, tokenizer
from jtok_jax.data.manifest import Manifest
from jtok_jax.errors import DataError

LOSSLESS = 0.001  # of a text may be lost before its bits a byte mean nothing


def open_corpus(folder: pathlib.Path, config: Config) -> Manifest:
    """Return the manifest of a corpus. Raises DataError: it is damaged."""
    found = manifest.read_manifest(folder)
    path, digest = folder / tokenizer.FILE_NAME, found.tokenizer_sha256
    if digest and not (path.is_file() and manifest.file_sha256(path) == digest):
        raise DataError(f"{path} is not the tokenizer the shards were written with.")
    manifest.verify_shards(folder, found, hashes=config.data.verify == "hash")
    return found


def check_vocabulary(found: Manifest, folder: pathlib.Path, vocab_size: int) -> None:
    """Raise DataError where a model has fewer rows than a corpus has ids."""
    if found.vocab_size > vocab_size:
        raise DataError(
            f"The tokenizer of {folder} has {found.vocab_size} entries, model.vocab_size is "
            f"{vocab_size}: ids up to {found.vocab_size - 1} would index past the "
            f"tables. Pass --config.model.vocab_size={found.vocab_size} or more."
        )


def compare(corpora: list[Manifest], folders: list[pathlib.Path]) -> str:
    """Return what a user should know of corpora that are mixed, or "".

    Raises DataError: their token ids do not mean the same.
    """
    for one, folder in zip(corpora, folders, strict=True):
        for name in ("tokenizer_sha256", "end_id", "vocab_size"):
            if getattr(one, name) != getattr(corpora[0], name):
                raise DataError(
                    f"{folder} was cut by another tokenizer than {folders[0]}, so their ids do not "
                    f"mean the same. Prepare it with --tokenizer={folders[0]}/{tokenizer.FILE_NAME}"
                )
    rules = {one.held_out for one in corpora}
    if len(corpora) == 1 or (len(rules) == 1 and manifest.BY_HASH in rules.pop()):
        return ""
    return (
        "A document held out in one corpus may train in another: only whole documents, held out "
        "by the same --valid_fraction, are so in all."
    )


def fingerprint(corpora: list[Manifest], parts: list[int]) -> dict[str, str]:
    """Return what training depends on: tokenizer, windows and the parts of the mixture."""
    alone = [one.fingerprint() for one in corpora]
    if len(corpora) == 1:
        return alone[0]
    train = [f"{count} of {one['train']}" for count, one in zip(parts, alone, strict=True)]
    return {
        "tokenizer": alone[0]["tokenizer"],
        "train": ", ".join(train),
        "valid": ", ".join(one["valid"] for one in alone),
    }


def text_bytes(found: Manifest) -> int:
    """Return the UTF-8 bytes of the held-out documents; 0: not known, or the ids lose text."""
    lost = manifest.lost_share(found.text.get("valid", {})) > LOSSLESS
    return 0 if lost else found.valid.text_bytes
