# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Changes of a configuration that would make it fit, each one checked by the same count."""

import itertools
from collections.abc import Callable, Iterator

from jtok_jax.config import Config
from jtok_jax.config_dict import from_config_dict, to_dict
from jtok_jax.errors import ConfigError
from jtok_jax.mesh import AXES

Change = dict[str, object]  # field -> value, as --config.FIELD=VALUE


def changed(config: Config, change: Change) -> Config:
    """`config` with some fields set. Raises ConfigError where they do not go together."""
    values = to_dict(config)
    for name, value in change.items():
        *path, last = name.split(".")
        group = values
        for part in path:
            group = group[part]
        group[last] = value
    return from_config_dict(values)


def that_fit(
    config: Config, fits: Callable[[Config], bool], *, devices: int, wanted: int = 3
) -> list[Change]:
    """Up to `wanted` ways to make it fit, of as few fields as possible, by different ones where
    possible.

    Args:
        fits: may raise ConfigError for a configuration that cannot be.
    """
    single = list(_candidates(config, devices))
    found: list[Change] = []
    alike: list[Change] = []  # that set the fields of one found, to other values
    for count in (1, 2, 3):
        for parts in itertools.combinations(single, count):
            change = {name: value for part in parts for name, value in part.items()}
            if len(change) != sum(map(len, parts)):
                continue  # a field set twice
            if any(one.items() <= change.items() for one in found):
                continue
            kin = any(one.keys() == change.keys() for one in found)
            if (kin and len(alike) == wanted) or not _fits(config, change, fits):
                continue
            (alike if kin else found).append(change)
            if len(found) == wanted:
                return found
    return (found + alike)[:wanted]


def _fits(config: Config, change: Change, fits: Callable[[Config], bool]) -> bool:
    try:
        return fits(changed(config, change))
    except ConfigError:
        return False


def _candidates(config: Config, devices: int) -> Iterator[Change]:
    """Those that cost least first."""
    model, train, tables = config.model, config.train, config.optimizer.tables
    if model.attention == "xla":
        yield {"model.attention": "chunked"}
    fsdp = config.mesh.fsdp
    while fsdp * 2 * config.mesh.expert * config.mesh.tensor <= devices:
        fsdp *= 2
        yield {"mesh.fsdp": fsdp, "mesh.data": -1}
    if model.jtok.kind != "none" and not config.mesh.table_rows:
        for name in AXES:
            yield {"mesh.table_rows": name}
    passes = train.grad_accumulation
    while passes * 2 <= train.batch_size and passes < 64:
        passes *= 2
        yield {"train.grad_accumulation": passes}
    for remat in {"none": ("dots", "full"), "dots": ("full",), "full": ()}[model.remat]:
        yield {"model.remat": remat}
    if model.jtok.kind != "none":
        if model.jtok.table_dtype == "float32":
            yield {"model.jtok.table_dtype": "bfloat16"}
        kinds = ("adamw", "lazy_adam", "rowwise_adam", "rowwise_adagrad")
        for kind in kinds[kinds.index(tables.kind) + 1 :]:
            yield {"optimizer.tables.kind": kind}
    if not model.loss_chunk:
        yield {"model.loss_chunk": 8192}
