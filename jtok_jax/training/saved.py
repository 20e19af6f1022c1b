# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Reads from a checkpoint what the tools need of it: the parameters, on any devices."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from jtok_jax.config import Config, MeshConfig
from jtok_jax.errors import CheckpointError, ConfigError, DataError
from jtok_jax.mesh import abstract_mesh, make_mesh
from jtok_jax.model.attention import choice_of
from jtok_jax.model.params import abstract_params, to_stored
from jtok_jax.model.placement import parameter_sharding, table_operations
from jtok_jax.store.mapped import Contents
from jtok_jax.store.tables import HostTables
from jtok_jax.training.checkpoint import RANKED_BY
from jtok_jax.training.damage import open_checkpointer, steps_of
from jtok_jax.training.leaves import (
    DIGESTS,
    PARAMS,
    config_of,
    load_leaves,
    read_metadata,
    sequences_seen,
)
from jtok_jax.training.optimizer import Optimizer, make_optimizer
from jtok_jax.training.resume import checkpoints_of
from jtok_jax.training.state import TrainState, abstract_state, named_leaves


class Saved(NamedTuple):
    """The part of a checkpoint that the tools read."""

    step: int
    config: Config
    data: dict[str, str]  # fingerprint of the data, see jtok_jax.data.manifest
    params: dict[str, jax.Array]
    tables: HostTables | None  # in host memory; None: `params` has them
    workdir: pathlib.Path
    end_id: int | None  # of the tokenizer, between documents; None: not known
    sequences: int  # trained on
    state: TrainState | None  # without parameters; None: not asked for


def load_params(
    workdir: pathlib.Path,
    choose: Callable[[Config], MeshConfig] | None = None,
    *,
    step: str | int = "newest",
    moments: bool = False,
) -> Saved:
    """Return the parameters of a checkpoint under `workdir`.

    The run may go on meanwhile: if it removes its newest checkpoint, the next one is read.

    Args:
        choose: a mesh of all devices here to split them over, by the configuration of the run; it
            becomes the `config.mesh` of what is returned, and says where tables lie. None: all of
            them on one device.
        step: "newest", "best" (of those still there, the lowest validation loss) or a number.
        moments: the optimizer's state too.

    Raises:
        CheckpointError: there is none, it is damaged, without moments, or other code wrote it.
        ConfigError: the mesh chosen does not fit the devices or the model.
    """
    folder = checkpoints_of(workdir)
    while True:
        before = max(steps_of(folder), default=0)
        try:
            return _load_params(workdir, folder, choose, str(step), moments)
        except CheckpointError:
            if step != "newest" or max(steps_of(folder), default=0) <= before:
                raise


def _load_params(
    workdir: pathlib.Path,
    folder: pathlib.Path,
    choose: Callable[[Config], MeshConfig] | None,
    step: str,
    moments: bool,
) -> Saved:
    with contextlib.closing(open_checkpointer(folder)) as checkpointer:
        number = _choose_step(checkpointer, step, folder)
        found = read_metadata(checkpointer, number)
        if moments and "step" not in found.metadata:
            raise CheckpointError(
                f"{workdir} holds no moments: it was grown without --moments, or converted. Leave "
                "init_moments and --moments out, or take the run that it was made of."
            )
        config = config_of(found)
        stored = config.mesh.table_dtype
        mesh_config = choose(config) if choose else config.mesh.tables_in("device")
        _require_reader_of(workdir, stored, mesh_config)
        config = dataclasses.replace(config, mesh=mesh_config)
        place, mesh = _placing(config, alone=choose is None)
        config = anywhere(config, mesh)
        optimizer = make_optimizer(config) if moments else None
        tables = _tables_of(config, mesh, found, workdir, optimizer, stored)
        wanted = {
            PARAMS + name: place(name, leaf) for name, leaf in abstract_params(config.model).items()
        }
        if moments:
            state = abstract_state(config, optimizer, mesh)._replace(params={})
            device = next(iter(wanted.values())).sharding if choose is None else None
            state = jax.tree.map(lambda x: x.update(sharding=device or x.sharding), state)
            wanted |= named_leaves(state)
        if tables:
            wanted = {name: one for name, one in wanted.items() if name not in tables.saved_shapes}
        try:
            leaves = load_leaves(
                checkpointer, found, wanted, tables, below="" if moments else PARAMS
            )
        except BaseException:
            if tables:
                tables.close()
            raise
    if tables and config.mesh.table_folder and not tables.is_published:
        tables.publish()
    if moments:
        values = [leaves.pop(name) for name in named_leaves(state)]
        state = jax.tree.unflatten(jax.tree.structure(state), values)
    params = {name.removeprefix(PARAMS): value for name, value in leaves.items()}
    return Saved(
        number, config, found.custom_metadata["data"], to_stored(config.model, params), tables,
        workdir, found.custom_metadata.get("end_id"), sequences_seen(found),
        state if moments else None,
    )  # fmt: skip


def _tables_of(
    config: Config, mesh: Mesh | AbstractMesh, found, workdir: pathlib.Path,
    optimizer: Optimizer | None, stored: str,
) -> HostTables | None:  # fmt: skip
    """Return room for the tables of a checkpoint in host memory; None: they are on devices."""
    if config.mesh.table_memory != "host":
        return None
    written = found.custom_metadata.get(DIGESTS, str(workdir.absolute()))
    dtype = config.mesh.table_dtype
    contents = Contents(
        f"step {found.step} of {workdir}{' in ' * bool(dtype)}{dtype}",
        {"step": found.step, "dtype": dtype, "digests": written},
    )
    return HostTables(
        config, mesh, optimizer.rows if optimizer else {}, contents=contents,
        saved_in_int8=stored == "int8",
    )  # fmt: skip


def _require_reader_of(workdir: pathlib.Path, stored: str, mesh: MeshConfig) -> None:
    """Raise ConfigError if rows are stored in another dtype than tables there may have."""
    if stored and mesh.table_dtype != stored:
        raise ConfigError(
            f"{workdir} was exported with rows in {stored}: generate, evaluate and lm_eval read "
            "them, in host memory. For training and other tools export it in bfloat16 or float32."
        )


def _choose_step(checkpointer, asked: str, folder: pathlib.Path) -> int:
    """Return the step of the checkpoint that `load_params` was asked for."""
    losses = {one.step: (one.metrics or {}).get(RANKED_BY) for one in checkpointer.checkpoints}
    if not losses:
        raise CheckpointError(f"No finished checkpoint in {folder}; train until the first save.")
    if asked == "newest":
        return max(losses)
    ranked = {step: loss for step, loss in losses.items() if loss is not None}
    if asked == "best" and ranked:
        return min(ranked, key=ranked.get)
    if asked.isdecimal() and int(asked) in losses:
        return int(asked)
    there = [f"{step}{' (validated)' * (step in ranked)}" for step in losses]
    raise CheckpointError(
        f"No checkpoint {asked!r} in {folder}; there are {', '.join(there)}. Pass one of them, "
        "newest, or best of those that are validated."
    )


def _placing(config: Config, *, alone: bool) -> tuple[Callable, Mesh | AbstractMesh]:
    """Return (name, leaf -> where it is restored), and the mesh."""
    if alone:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        sharding_of, mesh = lambda name, shape: device, abstract_mesh(MeshConfig(), 1)
    else:
        mesh = make_mesh(config.mesh)
        sharding_of = parameter_sharding(config, mesh)

    def place(name: str, leaf) -> jax.ShapeDtypeStruct:
        sharding = sharding_of(name, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return place, mesh


def anywhere(config: Config, mesh: Mesh | AbstractMesh) -> Config:
    """Return a run's configuration, with "auto" for kernels it asked for that cannot run here."""
    model = config.model
    try:
        choice_of(model, config.train.seq_len)
    except ConfigError:
        model = dataclasses.replace(model, attention="auto")
    try:
        table_operations(config, mesh)
    except ConfigError:
        jtok = dataclasses.replace(model.jtok, implementation="auto")
        model = dataclasses.replace(model, jtok=jtok)
    return dataclasses.replace(config, model=model)


def require_same_tokenizer(saved: Saved, tokenizer_sha256: str, where: pathlib.Path) -> None:
    """Raise DataError if text would be cut into other ids than the run was trained on."""
    trained = saved.data.get("tokenizer")
    if trained != tokenizer_sha256:
        raise DataError(
            f"The tokenizer of {where} (SHA-256 {tokenizer_sha256[:12]}) is not the one the run "
            f"was trained with ({str(trained)[:12]}). Prepare the text with "
            f"--tokenizer={saved.workdir}/tokenizer.json, or that of the run's data."
        )
