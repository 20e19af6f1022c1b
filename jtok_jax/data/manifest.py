# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""manifest.json: what a prepared corpus holds, with the hashes that protect it."""

import dataclasses
import fractions
import hashlib
import json
import math
import pathlib

from jtok_jax.errors import ConfigError, DataError

FILE_NAME = "manifest.json"
FORMAT = 1
MOST_PARTS = 100_000  # of a mixture
BY_HASH = "by hash"  # how documents are held out, if equal ones are in every corpus


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file of windows."""

    name: str
    bytes: int
    sha256: str
    windows: int


@dataclasses.dataclass(frozen=True)
class Split:
    """Train or valid: windows of seq_len + 1 ids, neighbours sharing one id.

    `targets` ids are predicted, the rest of the last window is padding (only in valid).
    """

    shards: tuple[Shard, ...]
    windows: int
    targets: int
    documents: int
    text_bytes: int  # UTF-8 bytes of the documents, end tokens not counted
    dropped_ids: int  # ids after the last whole window (only in train)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything a reader of the corpus needs to know and to check."""

    format: int
    seq_len: int
    dtype: str
    vocab_size: int
    end_id: int
    tokenizer_sha256: str
    train: Split
    valid: Split
    recipe: dict
    skipped: dict
    text: dict = dataclasses.field(default_factory=dict)  # counts of encoding.TextEncoder
    held_out: str = ""  # the rule for it; empty: of an earlier version

    def fingerprint(self) -> dict[str, str]:
        """Return what training depends on: tokenizer and windows, not where they came from."""
        form = f"{self.seq_len} {self.dtype} {self.end_id}"
        return {
            "tokenizer": self.tokenizer_sha256,
            "train": _digest(form, self.train),
            "valid": _digest(form, self.valid),
        }


def parse_mixture(path: str) -> list[tuple[pathlib.Path, int]]:
    """Return (folder, parts) of every corpus in a data.path: FOLDER, or A:0.7,B:0.3.

    Parts are whole numbers without a common divisor: 7 and 3.

    Raises ConfigError: of several corpora one has no weight, or a weight is not above 0, one folder
    is named twice, or a share is below one in `MOST_PARTS`.
    """
    if "," not in path or pathlib.Path(path).is_dir():
        return [(pathlib.Path(path), 1)]
    try:
        parts = [part.strip().rpartition(":") for part in path.split(",")]
        weights = [fractions.Fraction(weight) for _, _, weight in parts]
        folders = [pathlib.Path(folder) for folder, _, _ in parts]
        if min(weights) <= 0 or len(set(folders)) < len(folders):
            raise ValueError
    except (ValueError, ZeroDivisionError):
        raise ConfigError(
            f"data.path is {path!r}; expected a folder, or several with weights above 0, each "
            "once: data/web:0.7,data/code:0.3."
        ) from None
    whole = math.lcm(*(weight.denominator for weight in weights))
    counts = [int(weight * whole) for weight in weights]
    counts = [count // math.gcd(*counts) for count in counts]
    if sum(counts) > MOST_PARTS:
        raise ConfigError(
            f"data.path is {path!r}: a mixture of {sum(counts):,} parts, of at most "
            f"{MOST_PARTS:,}. Round the weights."
        )
    return list(zip(folders, counts, strict=True))


def absolute_path(path: str) -> str:
    """Return a data.path that names the same corpora from every folder."""
    parts = parse_mixture(path)
    if len(parts) == 1:
        return str(parts[0][0].absolute()) if path else ""
    return ",".join(f"{folder.absolute()}:{count}" for folder, count in parts)


def lost_share(counts: dict[str, int]) -> float:
    """Return the share of a text that its ids do not hold; of a corpus without counts, 0."""
    pairs = ("unknown", "tokens"), ("lost", "bytes")
    return max(counts.get(part, 0) / max(1, counts.get(whole, 0)) for part, whole in pairs)


def write_manifest(folder: pathlib.Path, manifest: Manifest) -> None:
    """Write the manifest of a prepared corpus."""
    (folder / FILE_NAME).write_text(json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")


def read_manifest(folder: pathlib.Path) -> Manifest:
    """Return the manifest of a prepared corpus. Raises DataError: there is none, or damaged."""
    path = folder / FILE_NAME
    if folder.is_file():
        raise DataError(f"{folder} is a file; expected the folder that jtok_jax.prepare wrote.")
    if not path.is_file():
        raise DataError(
            f"{folder} holds no prepared corpus ({FILE_NAME} is missing). If it was moved, pass "
            "its folder: --config.data.path to train.py, --data to other tools. Else make one:\n"
            f"python -m jtok_jax.prepare --input=GLOB --output={folder}"
        )
    try:
        values = json.loads(path.read_text())
        if values["format"] != FORMAT:
            raise TypeError(f"format {values['format']}, this version reads {FORMAT}")
        for name in ("train", "valid"):
            shards = tuple(Shard(**shard) for shard in values[name].pop("shards"))
            values[name] = Split(shards=shards, **values[name])
        return Manifest(**values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error!r}); prepare the corpus again.") from error


def verify_shards(folder: pathlib.Path, manifest: Manifest, *, hashes: bool) -> None:
    """Compare the size, and with `hashes` the SHA-256, of every shard and the tokenizer.

    Raises DataError: a file is missing, shorter, or has other contents.
    """
    for shard in (*manifest.train.shards, *manifest.valid.shards):
        path = folder / shard.name
        if pathlib.Path(shard.name).name != shard.name:
            raise DataError(f"{folder}: shard name {shard.name!r} leaves the folder. Refused.")
        if not path.is_file():
            raise DataError(f"{path} is missing; prepare the corpus again or restore the file.")
        size = path.stat().st_size
        if size != shard.bytes:
            raise DataError(
                f"{shard.name} ends at byte {size:,}, the manifest says {shard.bytes:,}. Likely "
                "an interrupted copy; fetch it again."
            )
        if hashes and file_sha256(path) != shard.sha256:
            raise DataError(
                f"{shard.name} does not have the SHA-256 in the manifest; fetch it again."
            )


def file_sha256(path: pathlib.Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(form: str, split: Split) -> str:
    content = json.dumps(dataclasses.asdict(split), sort_keys=True)
    return hashlib.sha256(f"{form} {content}".encode()).hexdigest()
