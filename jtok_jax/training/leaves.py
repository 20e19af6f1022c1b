# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Reads a checkpoint: its metadata, and its arrays onto devices or into host memory, verified."""

import pathlib

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from jtok_jax.config import Config
from jtok_jax.config_dict import completed, from_config_dict
from jtok_jax.errors import CheckpointError, ConfigError
from jtok_jax.model.params import declared_tables, init_rows, initial_options
from jtok_jax.store.part import intersection, relative_slices
from jtok_jax.store.pieces import PIECE, read_pieces
from jtok_jax.store.tables import HostTables
from jtok_jax.training.damage import reading
from jtok_jax.training.digest import digests, digests_of_regions, piece_digest, text_digest

PARAMS = "params/"  # leaves of a checkpoint that the tools read
SPARSE = "sparse"  # whether rows of tables that were never read are left out, as zeros
DIGESTS, DIGEST = "digests", "digest"  # of leaves, and of all other metadata


def read_metadata(checkpointer, step: int):
    """Return what Orbax keeps of a checkpoint. Raises DamagedError: it is not what was saved."""
    with reading(checkpointer.directory, step):
        found = checkpointer.metadata(step)
        if not {"config", "data"} <= (found.custom_metadata or {}).keys() or not found.metadata:
            raise ValueError("its metadata is incomplete")
        values = dict(found.custom_metadata)
        said = values.pop(DIGEST, None)  # none: of an earlier version
        if said is not None and said != text_digest(values):
            raise ValueError("its metadata differs from what was saved")
        return found


def sequences_seen(found) -> int:
    """Return how many sequences a run had trained on, by the metadata of its checkpoint."""
    saved = found.custom_metadata
    return saved.get("sequences", found.step * saved["config"]["train"]["batch_size"])


def config_of(found) -> Config:
    """Return the configuration in a checkpoint's metadata, whichever version wrote it."""
    try:
        return from_config_dict(completed(found.custom_metadata["config"]))
    except ConfigError as error:
        raise CheckpointError(
            f"Checkpoint step {found.step} was written by jtok_jax "
            f"{found.custom_metadata.get('jtok_jax')}, with an option that is no more. {error} "
            "Use the code that wrote it."
        ) from error


def load_leaves(
    checkpointer, found, wanted: dict, host_tables: HostTables | None = None, *, below: str = ""
) -> dict[str, jax.Array]:
    """Return the leaves of a checkpoint whose name begins with `below`.

    Args:
        wanted: shapes with shardings, by name.
        host_tables: tables in host memory, which are filled with all other leaves.

    Raises:
        CheckpointError: they are not those of `wanted` and `host_tables`. Orbax would cast dtypes.
        DamagedError: they are not what was saved.
    """
    _require_same_leaves(found, wanted | (host_tables.saved_shapes if host_tables else {}), below)
    sparse, said = found.custom_metadata.get(SPARSE, False), found.custom_metadata.get(DIGESTS)
    folder = pathlib.Path(checkpointer.directory)
    context = ocp.Context()  # a chunk of zeros was not written; a lost one changes the digest
    context.array.loading.raise_array_data_missing_error = not said
    with reading(folder, found.step), context:
        skipped = dict.fromkeys(found.metadata, ...)
        leaves = checkpointer.load(found.step, skipped | wanted)
        leaves = {name: leaves[name] for name in wanted}
        own = digests(leaves) if said else {}  # none: of an earlier version
        if host_tables and not host_tables.all_published():
            with host_tables.read_ahead():
                own |= _fill(host_tables, folder / str(found.step))
        changed = [name for name in own if said and own[name] != said[name]]
        if changed:
            raise ValueError(f"{', '.join(changed)} differ from what was saved")
    if host_tables and not host_tables.is_published:
        with host_tables.read_ahead():
            host_tables.finish_restore(sparse=sparse)
    return _with_first_rows(config_of(found), leaves) if sparse else leaves


def _fill(tables: HostTables, checkpoint: pathlib.Path) -> dict[str, int]:
    """Read the leaves of tables in host memory; return their digests. All processes call this.

    Published ones are read for the digests of their regions alone.
    """
    found = {}
    for name, shape in tables.saved_shapes.items():
        regions = tables.regions(name)
        sums = {region: 0 for region, is_read in regions.items() if is_read}
        for start, piece in read_pieces(checkpoint, name, list(sums)):
            if not tables.is_published:
                tables.fill(name, start, piece)
            for region in sums:
                if part := intersection(region, start, piece.shape):
                    array, begin = piece[relative_slices(part, start)], [x for x, _ in part]
                    sums[region] += piece_digest(array, begin, shape.shape)
        sums = {region: value % (1 << 32) for region, value in sums.items()}
        found[name] = dict.fromkeys(regions) | sums
    return digests_of_regions(found)


def _require_same_leaves(found, wanted: dict, below: str) -> None:
    saved = {name: leaf for name, leaf in found.metadata.items() if name.startswith(below)}
    problems = [f"  {name}: missing" for name in wanted.keys() - saved.keys()]
    problems += [f"  {name}: not in this configuration" for name in saved.keys() - wanted.keys()]
    describe = lambda leaf: f"{leaf.dtype}{tuple(leaf.shape)}"
    problems += [
        f"  {name}: saved {describe(saved[name])}, configuration gives {describe(wanted[name])}"
        for name in wanted.keys() & saved.keys()
        if describe(wanted[name]) != describe(saved[name])
    ]
    if problems:
        raise CheckpointError(
            f"Checkpoint step {found.step} does not fit this configuration:\n"
            + "\n".join(sorted(problems))
            + "\nNothing was loaded. Use the code and the configuration that wrote it."
        )


def _with_first_rows(config: Config, leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Return leaves of a sparse checkpoint, the rows that it leaves out drawn as at the start."""
    key, tables = jax.random.key(config.train.seed), declared_tables(config.model)
    streams = {table.stream for table in tables.values()}
    leaves = dict(leaves)

    def fill_rows(name: str, table: jax.Array, first: jax.Array) -> jax.Array:
        """Return `table`, donated, complete in rows from `first` on."""
        ids = first + jnp.arange(size, dtype=jnp.int32)
        beyond = jnp.full_like(ids, jnp.iinfo(jnp.int32).max)
        ids = {stream: ids if stream == tables[name].stream else beyond for stream in streams}
        part = jax.lax.dynamic_slice_in_dim(table, first, size, axis=-2)
        there = jnp.any(part != 0, axis=(*range(part.ndim - 2), part.ndim - 1), keepdims=True)
        new = jnp.where(there, part, init_rows(config.model, key, ids)[name])
        return jax.lax.dynamic_update_slice_in_dim(table, new, first, axis=-2)

    for name in tables.keys() & {leaf.removeprefix(PARAMS) for leaf in leaves}:
        table = leaves.pop(PARAMS + name)
        rows, sharding = table.shape[-2], table.sharding
        size = min(rows, max(1, PIECE * rows // table.nbytes))
        fill = jax.jit(
            fill_rows, static_argnums=0, donate_argnums=1, out_shardings=sharding,
            compiler_options=initial_options(),
        )  # fmt: skip
        for first in range(0, rows, size):  # the last piece begins earlier, if it has to
            table = fill(name, table, jnp.int32(min(first, rows - size)))
        leaves[PARAMS + name] = table
    return leaves
