# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Finds changes of a configuration that would make it fit, each checked by the same count."""

import itertools
from collections.abc import Callable, Iterator

from jtok_jax.config import Config
from jtok_jax.config_dict import from_config_dict, to_dict
from jtok_jax.errors import ConfigError
from jtok_jax.model.params import declared_tables

Change = dict[str, object]  # field -> value, as --config.FIELD=VALUE
# Fields that change what is trained, not only how.
OTHER_RUN = ("model.jtok.table_dtype", "model.arms.table_dtype", "optimizer.tables.kind")


def changed(config: Config, change: Change) -> Config:
    """Return `config` with some fields set; raise ConfigError where they do not go together."""
    values = to_dict(config)
    for name, value in change.items():
        *path, last = name.split(".")
        group = values
        for part in path:
            group = group[part]
        group[last] = value
    return from_config_dict(values)


def that_fit(config: Config, fits: Callable[[Config], bool], *, devices: int) -> list[Change]:
    """Return up to three ways to make it fit, by different fields and as few as possible.

    Args:
        fits: may raise ConfigError for a configuration that cannot be.
    """
    single = list(_candidates(config, devices))
    found: list[Change] = []
    for count in (1, 2, 3):
        for parts in itertools.combinations(single, count):
            change = _all_of(parts)
            if len(change) != sum(map(len, parts)) or not _fits(config, change, fits):
                continue  # a field set twice, or not enough
            fewer = itertools.combinations(parts, count - 1)
            if any(one.keys() == change.keys() for one in found) or (
                count > 1 and any(_fits(config, _all_of(rest), fits) for rest in fewer)
            ):
                continue  # known, or one part more than it takes
            found.append(change)
            if len(found) == 3:
                return found
    return found


def tried(config: Config, *, devices: int) -> list[str]:
    """Return the fields that `that_fit` changes, each once."""
    return list(dict.fromkeys(name for one in _candidates(config, devices) for name in one))


def _all_of(parts: tuple[Change, ...]) -> Change:
    return {name: value for part in parts for name, value in part.items()}


def _fits(config: Config, change: Change, fits: Callable[[Config], bool]) -> bool:
    try:
        return fits(changed(config, change))
    except ConfigError:
        return False


def _candidates(config: Config, devices: int) -> Iterator[Change]:
    """Yield changes, those that cost least first."""
    model, train, tables = config.model, config.train, config.optimizer.tables
    if model.attention == "xla":
        yield {"model.attention": "chunked"}
    yield from _meshes(config, devices)
    passes = train.grad_accumulation
    while passes * 2 <= train.batch_size and passes < 64:
        passes *= 2
        yield {"train.grad_accumulation": passes}
    for remat in {"none": ("dots", "full"), "dots": ("full",), "full": ()}[model.remat]:
        yield {"model.remat": remat}
    in_float32 = {
        "jtok": model.jtok.kind != "none" and model.jtok.table_dtype == "float32",
        "arms": model.arms.table_streams and model.arms.table_dtype == "float32",
    }
    for group in filter(in_float32.get, in_float32):
        yield {f"model.{group}.table_dtype": "bfloat16"}
    if declared_tables(model):
        kinds = ("adamw", "lazy_adam", "rowwise_adam", "rowwise_adagrad")
        for kind in kinds[kinds.index(tables.kind) + 1 :]:
            yield {"optimizer.tables.kind": kind}
        if config.mesh.table_memory == "device":
            yield {"mesh.table_memory": "host"}
        elif config.mesh.table_prefetch:
            yield {"mesh.table_prefetch": 0}
        if config.mesh.table_memory == "host" and not config.mesh.table_streaming:
            remat = {"model.remat": "dots"} if model.remat == "none" else {}
            yield {"mesh.table_prefetch": 0, "mesh.table_streaming": True} | remat
    if not model.loss_chunk:
        yield {"model.loss_chunk": 4096}


def _meshes(config: Config, devices: int) -> Iterator[Change]:
    """Yield meshes with more fsdp, or with rows of the tables over an axis that has devices."""
    fsdp, fixed = config.mesh.fsdp, config.mesh.expert * config.mesh.tensor
    while fsdp * fixed <= devices:
        grown = {} if fsdp == config.mesh.fsdp else {"mesh.fsdp": fsdp, "mesh.data": -1}
        if grown:
            yield grown
        sizes = {"data": devices // (fsdp * fixed), "fsdp": fsdp, "expert": config.mesh.expert}
        if declared_tables(config.model) and not config.mesh.table_rows:
            for name, size in sizes.items():
                if size > 1:
                    yield grown | {"mesh.table_rows": name}
        fsdp *= 2
