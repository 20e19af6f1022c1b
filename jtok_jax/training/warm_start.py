# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Begins a run with the parameters of another one, or of a Hugging Face model: `init_from`."""

import pathlib
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from jtok_jax.config import Config
from jtok_jax.data import tokenizer
from jtok_jax.data.manifest import file_sha256, parse_mixture, read_manifest
from jtok_jax.errors import ConfigError, DataError
from jtok_jax.huggingface.folder import is_folder, open_folder
from jtok_jax.model.params import abstract_params, to_logical, to_stored
from jtok_jax.model.placement import parameter_sharding
from jtok_jax.store.pieces import Pieces
from jtok_jax.store.tables import HostTables
from jtok_jax.training.leaves import PARAMS
from jtok_jax.training.moments import (
    fill_moments,
    moments_of,
    on_devices,
    require_same_betas,
    with_moments,
)
from jtok_jax.training.saved import Saved, load_params
from jtok_jax.training.state import TrainState


def begin_with(
    config: Config,
    mesh: Mesh,
    state: TrainState,
    tables: HostTables | None,
    say: Callable[[str], None],
) -> TrainState:
    """Return an initial state with the parameters of `config.init_from` in their place, by name.

    And with the moments of its optimizer, if `config.init_moments`. What the other model has not,
    such as tables, stays as configured.

    Args:
        tables: those in host memory, which take what they have of the other model.

    Raises:
        ConfigError: the other model has a parameter that this one has not, or of another shape;
            or the optimizer of its tables is another.
        CheckpointError, DataError: it cannot be read.
    """
    place, wanted = parameter_sharding(config, mesh), abstract_params(config.model)
    moments = config.init_moments
    if moments:  # all of them will be overwritten, so do not hold them meanwhile
        state = state._replace(opt_state=_freed(state.opt_state))
    shapes, read, what, saved = _open(config)
    _compare(shapes, {name: leaf.shape for name, leaf in wanted.items()}, what)
    taken = {}
    if tables:
        tables.complete()
    for name in shapes:
        value, dtype = read(name), wanted[name].dtype
        if tables and name in tables.whole:
            pieces = value if isinstance(value, Pieces) else Pieces.of(value)
            for start, piece in pieces.local_pieces():
                tables.fill(PARAMS + name, start, piece.astype(dtype, copy=False))
        else:
            taken[name] = jax.device_put(value.astype(dtype, copy=False), place(name, value.shape))
    own = sorted(wanted.keys() - shapes.keys())
    say(f"begins with {what}: {len(shapes)} parameters; new ones: {', '.join(own) or 'none'}")
    state = state._replace(params=state.params | to_stored(config.model, taken))
    if moments:
        require_same_betas(config, saved.config)
        opt_state = with_moments(state.opt_state, moments_of(saved.state), on_devices)
        state = state._replace(opt_state=opt_state)
    if moments and tables:
        fill_moments(tables, saved.tables, saved.state)
    return state


def _open(config: Config) -> tuple[dict[str, tuple], Callable, str, Saved | None]:
    """Return of `config.init_from` shapes by name, what reads one, its name, and a run's rest."""
    path, _, step = config.init_from.partition("@")
    folder = pathlib.Path(path)
    if is_folder(folder):
        if config.init_moments:
            raise ConfigError(f"init_moments: {folder} is of Hugging Face, and has none.")
        opened = open_folder(folder, dtype=config.model.param_dtype)
        return opened.shapes(), opened.parameter, f"{folder}", None
    places = config.mesh.tables_in(config.mesh.table_memory)
    saved = load_params(
        folder, lambda _: places, step=step or "newest", moments=config.init_moments
    )
    found = to_logical(saved.params)
    if saved.tables:
        rows = saved.tables.by_name().items()
        found |= {
            name.removeprefix(PARAMS): value for name, value in rows if name.startswith(PARAMS)
        }
    shapes = {name: value.shape for name, value in found.items()}
    return shapes, found.__getitem__, f"{folder} at step {saved.step}", saved


def _freed(opt_state: dict[str, object]) -> dict[str, object]:
    """Return shapes, dtypes and shardings of arrays, which are deleted."""

    def freed(x: jax.Array) -> jax.ShapeDtypeStruct:
        found = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        x.delete()
        return found

    return jax.tree.map(freed, opt_state)


def require_same_words(config: Config) -> None:
    """Raise DataError if the data was cut by another tokenizer than `init_from` has."""
    own = pathlib.Path(config.init_from.partition("@")[0]) / tokenizer.FILE_NAME
    if config.data.source != "prepared" or not config.data.path or not own.is_file():
        return
    folder, _ = parse_mixture(config.data.path)[0]  # all of one tokenizer
    found = read_manifest(folder).tokenizer_sha256
    if found and found != file_sha256(own):
        raise DataError(
            f"{folder} was cut by another tokenizer than {own.parent} has. Prepare it with "
            f"--tokenizer={own}"
        )


def _compare(found: dict[str, tuple], wanted: dict[str, tuple], what: str) -> None:
    problems = [f"{name}: not in this configuration" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name}: {list(shape)} there, {list(wanted[name])} here"
        for name, shape in found.items()
        if name in wanted and shape != wanted[name]
    ]
    if problems:
        raise ConfigError(
            f"init_from: the parameters of {what} do not fit:\n  "
            + "\n  ".join(sorted(problems))
            + "\nTake its model: --config=configs/pretrained.py:FOLDER"
        )
