# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""python -m jtok_jax.scone: what SCONE (arXiv 2502.01637) needs beside a run.

python -m jtok_jax.scone build --data=data/docs --max_n=5 --rows=1000000 --output=data/docs.ngrams
python -m jtok_jax.scone export --from=runs/scone --output=runs/scone-table
"""

import argparse
import os
import pathlib
import sys
import tempfile

import numpy as np
import tqdm

from jtok_jax.data import manifest, tokenizer
from jtok_jax.data.manifest import Manifest
from jtok_jax.data.ngram_counts import Counted, Counter, most_frequent, new_file
from jtok_jax.data.ngrams import Description, FrequentNgrams
from jtok_jax.data.windows import Windows, allow_open_files
from jtok_jax.errors import ConfigError, DataError, exit_on_error
from jtok_jax.scone_export import INT8, export
from jtok_jax.streams import MOST_FREQUENT

SHOWN = 4  # n-grams of each length that are shown


def build(
    data: pathlib.Path, output: pathlib.Path, *, max_n: int, rows: int, min_count: int, workers: int
) -> FrequentNgrams:
    """Write the `rows` most frequent n-grams of the training documents of a prepared corpus.

    Temporary files lie beside `output`: about 30 bytes a token, 70 if min_count is 1.

    Args:
        min_count: an n-gram is counted only if both its parts occur so often.
        workers: threads that sort and merge.

    Raises:
        ConfigError: a number is out of range.
        DataError: the corpus is damaged, no n-gram is frequent, or files cannot be written.
    """
    for name, value, least, most in (
        ("max_n", max_n, 2, 255), ("rows", rows, 1, MOST_FREQUENT),
        ("min_count", min_count, 1, 1 << 62), ("workers", workers, 1, 1 << 10),
    ):  # fmt: skip
        if not least <= value <= most:
            raise ConfigError(f"--{name} is {value}; expected {least} to {most}.")
    if output.exists():
        raise DataError(f"{output} exists; delete it first, or take another --output.")
    found = manifest.read_manifest(data)
    manifest.verify_shards(data, found, hashes=False)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
            levels = _count(data, found, pathlib.Path(folder), max_n, min_count, workers)
            kept = most_frequent(levels, rows, vocab_size=found.vocab_size)
            if not kept:
                raise DataError(
                    f"No two tokens of {data} occur together {min_count} times. Give more text or "
                    "a lower --min_count."
                )
            ngrams = FrequentNgrams(_describe(found, kept), *zip(*kept, strict=True))
            ngrams.save(output)
    except OSError as error:
        raise DataError(f"{error}. Nothing was written to {output}.") from error
    return ngrams


def _count(
    data: pathlib.Path, found: Manifest, folder: pathlib.Path, max_n: int, min_count: int,
    workers: int,
) -> list[Counted]:  # fmt: skip
    tokens = read_tokens(data, found, folder)
    with tqdm.tqdm(total=len(tokens) * (max_n - 1), unit="token", unit_scale=True) as bar:
        bar.set_description("counting")
        counter = Counter(
            tokens, vocab_size=found.vocab_size, boundary_id=found.end_id, min_count=min_count,
            folder=folder, workers=workers, progress=bar.update,
        )  # fmt: skip
        return counter.count(max_n)


def read_tokens(data: pathlib.Path, found: Manifest, folder: pathlib.Path) -> np.ndarray:
    """Return the ids of all training documents, mapped from a file.

    Raises DataError: they lack the token that ends a document.
    """
    allow_open_files(len(found.train.shards))
    windows = Windows(data, found, "train", seq_len=found.seq_len)
    tokens = new_file(folder / "tokens.bin", found.dtype, found.train.targets + 1)
    tokens[0], ends = found.end_id, 0
    bar = tqdm.trange(len(windows), unit="window", unit_scale=True, desc="reading")
    for index in bar:  # a window begins with the last id of the one before
        first, ids = index * found.seq_len + 1, windows[index][1:]
        tokens[first : first + found.seq_len] = ids
        ends += np.count_nonzero(ids == found.end_id)
    if not ends and found.train.documents - 1 > found.train.dropped_ids:  # these may hold some
        raise DataError(
            f"{data} has {found.train.documents:,} documents, and the token {found.end_id} that "
            "parts them is nowhere: n-grams would cross documents. Prepare it again."
        )
    return tokens


def _describe(found: Manifest, kept: list[Counted]) -> Description:
    return Description(
        rows=tuple(len(one.keys) for one in kept),
        vocab_size=found.vocab_size,
        boundary_id=found.end_id,
        least_count=min(int(one.counts.min()) for one in kept),
        tokenizer=found.tokenizer_sha256,
        corpus=found.fingerprint()["train"],
    )


def _report(ngrams: FrequentNgrams, data: pathlib.Path, asked: int) -> str:
    """Return what was kept, with the most frequent n-grams of each length as text."""
    kept, lines = ngrams.description, []
    path, decode = data / tokenizer.FILE_NAME, None
    if path.is_file():
        decode = tokenizer.load_tokenizer(path).decode
    for index, (rows, counts) in enumerate(zip(kept.rows, ngrams.counts, strict=True)):
        best = ngrams.offsets[index] + np.argsort(-counts.astype(np.int64), kind="stable")[:SHOWN]
        tokens, _ = ngrams.tokens(best)
        texts = [decode(one[: index + 2].tolist()) if decode else str(one) for one in tokens]
        most, shown = int(counts.max()), ", ".join(map(repr, texts))
        lines.append(f"  {index + 2} tokens: {rows:>11,} rows, at most {most:,} times: {shown}")
    lines.append(f"  {len(ngrams):,} rows in all, each at least {kept.least_count} times")
    if len(ngrams) < asked:
        lines.append(f"  fewer than the {asked:,} asked for: no others are frequent")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jtok_jax.scone", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build_parser = commands.add_parser("build", help="keep the frequent n-grams of a corpus")
    option = build_parser.add_argument
    option("--data", required=True, type=pathlib.Path, help="folder of jtok_jax.prepare")
    option("--output", required=True, type=pathlib.Path, help="file to write")
    option("--rows", required=True, type=int, help="n-grams to keep, of all lengths together")
    option("--max_n", type=int, default=5, help="tokens of the longest (5)")
    option("--min_count", type=int, default=5, help="of both parts of an n-gram (5)")
    cores = len(os.sched_getaffinity(0))
    option("--workers", type=int, default=cores, help="threads (one a core)")
    export_parser = commands.add_parser("export", help="make a table of what A_f makes")
    option = export_parser.add_argument
    option("--from", dest="run", required=True, help="folder of a run, or FOLDER@STEP")
    option("--output", required=True, type=pathlib.Path, help="folder to write")
    dtypes = "float32", "bfloat16", INT8
    option("--dtype", default="", choices=dtypes, help="of rows (as of tables)")
    option("--batch_size", type=int, default=4096, help="n-grams at a time (4096)")
    options = vars(parser.parse_args(arguments))
    command = options.pop("command")
    with exit_on_error():
        if command == "export":
            model = export(**options)
            rows = model.id_streams[model.arms.scone.stream].rows
            dtype = options["dtype"] or model.arms.table_dtype
            print(f"{options['output']}: {rows:,} rows in {dtype}")
            return
        ngrams = build(**options)
        print(f"{options['output']}:\n{_report(ngrams, options['data'], options['rows'])}")


if __name__ == "__main__":
    main(sys.argv[1:])
