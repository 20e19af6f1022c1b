# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Turns SCONE's A_f into the table of what it makes, one row a frequent n-gram, to be looked up."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from jtok_jax.config import Config, MeshConfig
from jtok_jax.config_dict import to_dict
from jtok_jax.data import tokenizer
from jtok_jax.errors import ConfigError, WorkdirError
from jtok_jax.model.arms import table_name
from jtok_jax.model.ngram_index import NONE, indices_of, ngrams_of
from jtok_jax.model.params import Params, bind, declared_tables, to_logical
from jtok_jax.model.scone import embed_ngrams
from jtok_jax.model.tables import ROWS
from jtok_jax.model_config import ModelConfig
from jtok_jax.store.rows import SCALE, in_int8, saved_name
from jtok_jax.training.checkpoint import Checkpoints
from jtok_jax.training.digest import digests
from jtok_jax.training.leaves import PARAMS
from jtok_jax.training.resume import CONFIG_FILE, keep_tokenizer, new_folder
from jtok_jax.training.saved import Saved, load_params

INT8 = "int8"
ROOM = 0.5  # nodes a token of a batch, of which the n-grams in order share most prefixes


def served_model(model: ModelConfig, dtype: str = "") -> ModelConfig:
    """Return the model whose table takes the place of A_f.

    Args:
        dtype: of the table, "float32" or "bfloat16"; "" and "int8": that of tables of arms.

    Raises:
        ConfigError: the model has no A_f; or other arms have tables of another dtype.
    """
    arms, dtype = model.arms, dtype.replace(INT8, "")
    if not arms.makes_ngrams:
        raise ConfigError("This run has no A_f: model.arms.scone.kind is model where there is one.")
    if arms.table_streams and dtype not in ("", arms.table_dtype):
        raise ConfigError(
            f"--dtype is {dtype}, but the run has other tables in {arms.table_dtype}, and all have "
            "one dtype. Leave it out."
        )
    scone = dataclasses.replace(arms.scone, kind="table")
    arms = dataclasses.replace(arms, scone=scone, table_dtype=dtype or arms.table_dtype)
    return dataclasses.replace(model, arms=arms)


def export(
    run: str, output: pathlib.Path, *, dtype: str = "", batch_size: int = 4096
) -> ModelConfig:
    """Write a run of no steps whose table has what A_f makes of every n-gram; return its model.

    Rows come into hidden files beside `output` first. Killed, the same command goes on from there.

    Args:
        run: a folder, or FOLDER@STEP.
        dtype: see `served_model`; "int8": all tables are stored so, for tools that read them.
        batch_size: n-grams at a time.

    Raises:
        ConfigError: see `served_model`; or a batch has no n-gram.
        CheckpointError: there is no such checkpoint.
        WorkdirError: `output` holds something, or cannot be written.
    """
    if batch_size < 1:
        raise ConfigError(f"--batch_size is {batch_size}; expected at least 1.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise WorkdirError(f"{output} is not an empty folder. Nothing was written.")
    path, _, step = run.partition("@")
    saved = load_params(pathlib.Path(path), step=step or "newest")
    model = served_model(saved.config.model, dtype)
    params = to_logical(saved.params)
    try:
        rows = RowFile(output, saved, dtype or model.arms.table_dtype)
        for first, made in _made(saved.config.model, params, rows.done, batch_size):
            rows.write(first, made)
        made_here = table_name("scone", model.arms.scone.stream)
        params |= _named(made_here, rows.arrays)
        config = Config(model=model, train=saved.config.train)
        if dtype == INT8:
            mesh = MeshConfig(table_memory="host", table_dtype=INT8)
            config = dataclasses.replace(config, mesh=mesh)
            for name in declared_tables(model).keys() - {made_here}:
                params |= _named(name, in_int8(params[name]))
        _write(output, config, saved, params)
        rows.remove()
    except OSError as error:
        raise WorkdirError(f"{error}. Nothing was written to {output}.") from error
    return model


def _made(
    model: ModelConfig, params: Params, done: int, batch_size: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (row of the table, float [n, D] from there on), from row `done` on; 0 is of none."""
    stream = model.id_streams[model.arms.scone.stream]
    index = indices_of(params)[stream.name]
    ngrams = ngrams_of(jax.tree.map(np.asarray, index), stream)
    run = jax.jit(functools.partial(_outputs, model))
    bar = tqdm.tqdm(total=stream.rows, initial=max(0, done - 1), unit="n-gram", unit_scale=True)
    with bar:
        for first in range(max(done, 1), stream.num_rows, batch_size):
            rows = np.arange(first, min(first + batch_size, stream.num_rows)) - 1
            tokens, lengths = ngrams.tokens(np.resize(rows, batch_size))  # batches of one shape
            tokens = np.where(np.arange(stream.order) < lengths[:, None], tokens, NONE)
            yield first, np.asarray(run(params, tokens, lengths.astype(np.int32)))[: len(rows)]
            bar.update(len(rows))


def _outputs(model: ModelConfig, params: Params, tokens_Rn: jax.Array, lengths_R: jax.Array):
    """Return what A_f makes of n-grams, [R, D]: each is a sequence, and ends it."""
    module, stream = bind(model, params), model.id_streams[model.arms.scone.stream]
    embed = lambda ids: module.embed[jnp.maximum(ids, 0)].astype(model.compute_dtype)
    known = module.scone, tokens_Rn, None, indices_of(params)[stream.name], stream, embed
    made_RnD, _ = embed_ngrams(*known, embed(tokens_Rn), room=ROOM, training=False, mesh=None)
    return jnp.take_along_axis(made_RnD, lengths_R[:, None, None] - 1, axis=1)[:, 0]


def _named(table: str, leaves: dict[str, np.ndarray]) -> Params:
    """Return the leaves of a table by the names that parameters have in a checkpoint."""
    return {saved_name(table, leaf).removeprefix(PARAMS): one for leaf, one in leaves.items()}


def _write(output: pathlib.Path, config: Config, saved: Saved, params: Params) -> None:
    kept = {name: value for name, value in params.items() if not name.startswith("scone/")}
    with new_folder(output) as folder:
        (folder / CONFIG_FILE).write_text(json.dumps(to_dict(config), indent=1) + "\n")
        keep_tokenizer(folder, saved.workdir / tokenizer.FILE_NAME)
        words = {name: one for name, one in saved.data.items() if name == "tokenizer"}
        checkpoints = Checkpoints(folder, config, data=words, end_id=saved.end_id)
        checkpoints.save_params(kept)
        checkpoints.close()


class RowFile:
    """The rows made so far, in hidden files beside the output, and a note of how many they are.

    arrays: by leaf, mapped; [1, rows, D], and of int8 also float32 scales [1, rows].
    done: rows that are there, the first of them zeros.
    """

    def __init__(self, output: pathlib.Path, saved: Saved, dtype: str):
        """Open the files if they are of this checkpoint and dtype, else begin. Raises OSError."""
        beside = lambda what: output.with_name(f".{output.name}.export-{what}")
        self._note = beside("done.json")
        model = saved.config.model
        rows = model.id_streams[model.arms.scone.stream].num_rows
        shapes = {ROWS: ((1, rows, model.model_dim), dtype)}
        if dtype == INT8:
            shapes[SCALE] = (1, rows), np.float32
        files = {leaf: beside(leaf) for leaf in (ROWS, SCALE)}
        self._files = [*files.values()]  # with those of an export to another dtype
        self._of = {"digests": digests(saved.params), "dtype": dtype}
        try:
            note = json.loads(self._note.read_text())
            self.done = note["done"] if note["of"] == self._of else 0
        except (FileNotFoundError, ValueError, KeyError):
            self.done = 0
        output.parent.mkdir(parents=True, exist_ok=True)
        mode = "r+" if self.done and all(files[leaf].exists() for leaf in shapes) else "w+"
        if mode == "w+":  # a note of other rows must not count for these
            self._note.unlink(missing_ok=True)
            self.done = 0
        self.arrays = {
            leaf: np.memmap(files[leaf], jnp.dtype(of), mode, shape=shape)
            for leaf, (shape, of) in shapes.items()
        }

    def write(self, first: int, rows: np.ndarray) -> None:
        """Write rows from `first` on; the note says so once they are on the disk."""
        stored = in_int8(rows) if SCALE in self.arrays else {ROWS: rows}
        for leaf, value in stored.items():
            self.arrays[leaf][0, first : first + len(rows)] = value
            self.arrays[leaf].flush()
        self.done = first + len(rows)
        partial = self._note.with_suffix(".partial")
        partial.write_text(json.dumps({"of": self._of, "done": self.done}))
        partial.replace(self._note)

    def remove(self) -> None:
        """Delete the files."""
        del self.arrays
        for path in (*self._files, self._note):
            path.unlink(missing_ok=True)
