# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""python -m jtok_jax.prepare: text, JSON, Parquet or token ids into token windows.

python -m jtok_jax.prepare --input=stdlib --output=data/stdlib
python -m jtok_jax.prepare --input='docs/*.jsonl.xz' --output=data/docs --vocab_size=8192
"""

import argparse
import dataclasses
import pathlib
import secrets
import shutil
import sys
from collections.abc import Iterator

import tokenizers

import jtok_jax
from jtok_jax.data import manifest, token_ids, tokenizer, windows
from jtok_jax.data.corpus import Skipped
from jtok_jax.data.encoding import TextEncoder
from jtok_jax.data.source import Piece, Recipe, Source
from jtok_jax.errors import DataError, exit_on_error

DEFAULT_VOCAB = 4096
ENCODE_BATCH, ENCODE_SIZE = 256, 1 << 20  # documents or characters encoded at once


def prepare(recipe: Recipe, output: pathlib.Path) -> manifest.Manifest:
    """Write the corpus of `recipe` to `output` and return its manifest.

    Everything is written to a folder beside `output`, renamed at the end: an interrupted call
    leaves nothing that looks finished, and of two at a time one is refused at the end.

    Raises DataError: nothing matches, text is bad, a split is empty, `output` holds other data or
    cannot be written.
    """
    output = output.resolve()
    partial = output.with_name(f".{output.name}.{secrets.token_hex(4)}.partial")
    try:
        if output.exists() and any(output.iterdir()):
            return _already_prepared(recipe, output)
        for left in output.parent.glob(f".{output.name}.*partial"):
            advice = "a preparation under way, or a killed one: then delete it."
            print(f"{left}: {advice}", file=sys.stderr)
        partial.mkdir(parents=True)
        return _prepare(recipe, output, partial)
    except OSError as error:
        raise DataError(f"{error}. Nothing was written to {output}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _prepare(recipe: Recipe, output: pathlib.Path, partial: pathlib.Path) -> manifest.Manifest:
    given = tokenizer.load_tokenizer(pathlib.Path(recipe.tokenizer)) if recipe.tokenizer else None
    source = Source(recipe, vocab_size=_vocabulary(given) if given else recipe.vocab_size)
    print(source.note, end="")
    encoder = given if given or recipe.ids else _new_tokenizer(recipe, source)
    digest = ""  # token ids may come without a tokenizer
    if encoder:
        target = partial / tokenizer.FILE_NAME
        if given:
            shutil.copyfile(recipe.tokenizer, target)
        else:
            target.write_text(encoder.to_str(pretty=True), "utf-8")
        digest = manifest.file_sha256(target)
    size = _vocabulary(encoder) if encoder else recipe.vocab_size
    end_id = recipe.end_id if recipe.ids else tokenizer.end_token_id(encoder, recipe.end_token)
    form = {"seq_len": recipe.seq_len, "end_id": end_id}
    form["dtype"] = "uint16" if size <= 1 << 16 else "uint32"
    writers = {name: windows.WindowWriter(partial, name, **form) for name in ("train", "valid")}
    skipped = Skipped()
    counting = encoder and TextEncoder(encoder, end_id, max_lost=recipe.max_lost_text)
    if recipe.ids:
        _write_ids(writers, counting, source, skipped)
    else:
        cut = tokenizer.may_cut(encoder)
        _write_text(writers, counting, source.pieces(skipped, "encoding", cut=cut))
    if counting:
        counting.check()
    result = manifest.Manifest(
        format=manifest.FORMAT,
        vocab_size=size,
        tokenizer_sha256=digest,
        train=writers["train"].close(pad_tail=False),
        valid=writers["valid"].close(pad_tail=True),
        recipe={**dataclasses.asdict(recipe), "version": jtok_jax.__version__},
        skipped=dict(skipped.counts),
        text={name: dict(found) for name, found in counting.counts.items()} if counting else {},
        held_out=source.rule,
        **form,
    )
    _check_splits(result)
    manifest.write_manifest(partial, result)
    if output.exists():
        output.rmdir()  # empty, as seen above
    partial.rename(output)
    for line in skipped.describe():
        print(line)
    if counting:
        print("What the token ids hold of the text:", *map(counting.describe, writers), sep="\n")
    return result


Writers = dict[str, windows.WindowWriter]  # of each split


def _write_text(writers: Writers, encoder: TextEncoder, pieces: Iterator[Piece]) -> None:
    for group in _groups(pieces):
        texts = [piece.content for piece in group]
        found = encoder.encode([piece.split for piece in group], texts)
        for piece, ids in zip(group, found, strict=True):
            size = len(piece.content.encode())
            writers[piece.split].add(ids, text_bytes=size, last=piece.last)


def _groups(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Yield pieces that are encoded at once, on all cores; long ones a few at a time."""
    group, size = [], 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.content)
        if len(group) == ENCODE_BATCH or size >= ENCODE_SIZE:
            yield group
            group, size = [], 0
    if group:
        yield group


def _write_ids(
    writers: Writers, counting: TextEncoder | None, source: Source, skipped: Skipped
) -> None:
    """Write token ids as they are; without a tokenizer their bytes of text are unknown, 0."""
    for piece in source.pieces(skipped, "reading token ids"):
        size = counting.measure(piece.split, piece.content.tolist()) if counting else 0
        writers[piece.split].add(piece.content, text_bytes=size, last=piece.last)


def _vocabulary(encoder: tokenizers.Tokenizer) -> int:
    """Return the size of a vocabulary, whose ids may have gaps."""
    return max(encoder.get_vocab().values()) + 1


def _new_tokenizer(recipe: Recipe, source: Source) -> tokenizers.Tokenizer:
    pieces = source.pieces(Skipped(), "training the tokenizer", cut=True)
    texts = (piece.content for piece in pieces if piece.split == "train")
    return tokenizer.train_tokenizer(texts, vocab_size=recipe.vocab_size or DEFAULT_VOCAB)


def _already_prepared(recipe: Recipe, output: pathlib.Path) -> manifest.Manifest:
    found = manifest.read_manifest(output)
    defaults = {field.name: field.default for field in dataclasses.fields(recipe)}
    before = defaults | found.recipe  # a recipe of an earlier version has fewer options
    changed = [
        f"{name}: {before[name]!r}, now {value!r}"
        for name, value in dataclasses.asdict(recipe).items()
        if before[name] != value
    ]
    if changed:
        raise DataError(
            f"{output} holds another corpus ({'; '.join(changed)}). Nothing was changed. Use "
            "another --output or delete that folder."
        )
    manifest.verify_shards(output, found, hashes=True)
    print(
        f"{output} is already prepared with these options; nothing to do. The input was not read "
        "again: delete that folder if it has changed."
    )
    return found


def _check_splits(result: manifest.Manifest) -> None:
    for name in ("train", "valid"):
        split = getattr(result, name)
        if not split.windows:
            count = result.train.documents + result.valid.documents
            raise DataError(
                f"The {name} split has {split.documents} documents and no window of "
                f"{result.seq_len} tokens. Give more text, a shorter --seq_len, another "
                f"--valid_fraction (there are {count} documents), or held-out files with "
                "--valid_input."
            )


def _describe(result: manifest.Manifest, output: pathlib.Path) -> str:
    lines = [f"{output}: vocabulary {result.vocab_size}, windows of {result.seq_len} tokens"]
    for name in ("train", "valid"):
        split = getattr(result, name)
        lines.append(
            f"  {name}: {split.documents:,} documents, "
            f"{f'{split.text_bytes:,} bytes, ' if split.text_bytes else ''}"
            f"{split.targets:,} tokens in {split.windows:,} windows (shards: {len(split.shards)})"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jtok_jax.prepare", description=__doc__.splitlines()[0]
    )
    option = parser.add_argument
    option("--input", required=True, help='a file, a folder, a quoted glob pattern, or "stdlib"')
    option("--output", required=True, type=pathlib.Path, help="folder to write")
    option("--valid_input", default="", help="held-out files; default: a share of --input")
    option("--valid_fraction", type=float, default=0.01, help="documents held out (default 0.01)")
    option("--vocab_size", type=int, default=0, help="of a tokenizer trained here (4096)")
    option("--tokenizer", default="", help="take this tokenizer.json instead of training one")
    option("--end_token", default=tokenizer.END_TOKEN, help="token between documents")
    option("--seq_len", type=int, default=1024, help="targets per window (1024)")
    option("--text_key", default="text", help="of JSON objects, or the Parquet column (text)")
    option("--ids", choices=token_ids.DTYPES, default="", help="the input holds token ids")
    option("--end_id", type=int, default=-1, help="between the documents of --ids")
    option("--max_lost_text", type=float, default=0.01, help="share a tokenizer may lose (0.01)")
    spellings = "--on_bad_text", "--on-bad-text"
    option(*spellings, choices=("refuse", "skip"), default="refuse", help="(refuse)")
    values = vars(parser.parse_args(arguments))
    output = values.pop("output")
    with exit_on_error():
        print(_describe(prepare(Recipe(**values), output), output))


if __name__ == "__main__":
    main()
