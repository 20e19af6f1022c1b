# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The frequent n-grams of a run: their file, checked, and the model's arrays that hold them."""

import dataclasses
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from jtok_jax.config import Config
from jtok_jax.data.manifest import absolute_path
from jtok_jax.data.ngrams import FrequentNgrams, open_ngrams
from jtok_jax.errors import ConfigError, DataError
from jtok_jax.model.ngram_index import build_index, names_of
from jtok_jax.model.params import Params, declared_tables
from jtok_jax.model.placement import parameter_sharding


def with_absolute_paths(config: Config) -> Config:
    """Return a configuration that names the same data from every folder."""
    data = config.data
    ngrams = str(pathlib.Path(data.ngrams).absolute()) if data.ngrams else ""
    data = dataclasses.replace(data, path=absolute_path(data.path), ngrams=ngrams)
    return dataclasses.replace(config, data=data)


def open_frequent(config: Config, fingerprint: Mapping[str, str]) -> FrequentNgrams | None:
    """Return the n-grams of `data.ngrams`, those of the model's stream; None: it has none.

    None too where a run begins with another model, which has them.

    Args:
        fingerprint: of the data that the run reads.

    Raises:
        ConfigError: there is a file and no stream, or a stream and no file.
        DataError: the file is damaged, or of another tokenizer, corpus, length or number of rows.
    """
    stream, file = next(iter(config.model.frequent_streams.values()), None), config.data.ngrams
    if not stream:
        if file:
            raise ConfigError(
                "data.ngrams is set, but no stream reads it. Declare one and read it: "
                "model.streams=frequent=5:ROWS:frequent model.arms.names=scone"
            )
        return None
    if not file:
        if config.init_from:
            return None
        raise ConfigError(
            f"model.streams declares {stream.name} as frequent n-grams, and data.ngrams is empty. "
            "python -m jtok_jax.scone build makes the file."
        )
    path = pathlib.Path(file)
    ngrams = open_ngrams(path, tokenizer=fingerprint.get("tokenizer", "none"))
    known = ngrams.description
    if known.corpus not in fingerprint["train"]:
        raise DataError(f"{path} holds n-grams of another corpus. Build it again from this one.")
    if (known.max_n, len(ngrams)) != (stream.order, stream.rows):
        raise DataError(
            f"{path} has {len(ngrams)} n-grams of up to {known.max_n} tokens; model.streams says "
            f"{stream.rows} of up to {stream.order}. Write "
            f"{stream.name}={known.max_n}:{len(ngrams)}:frequent"
        )
    return ngrams


def with_frequent(
    config: Config, mesh: Mesh, params: Params, ngrams: FrequentNgrams | None
) -> Params:
    """Return parameters whose arrays of frequent n-grams, if there are any, hold those of the file.

    Raises ConfigError: there is none, and what the run begins with has none either; or that has
    rows of others.
    """
    stream = next(iter(config.model.frequent_streams.values()), None)
    if not stream:
        return params
    names, place = names_of(stream.name), parameter_sharding(config, mesh)
    if not ngrams:
        if (params[names.entries] < 0).all():
            raise ConfigError(
                "data.ngrams is empty, and init_from names a model without frequent n-grams. "
                "python -m jtok_jax.scone build makes the file."
            )
        return params
    index = build_index(ngrams, stream)
    known = [np.asarray(params[name]) for name in names]
    reads = [one.stream for one in declared_tables(config.model).values()]
    is_filled = config.init_from and (known[1] >= 0).any()
    if is_filled and stream.name in reads and not np.array_equal(known[1], index.entries):
        raise ConfigError(
            f"{config.data.ngrams} holds other n-grams than {config.init_from}, whose tables have "
            "a row for each of its own. Leave data.ngrams empty."
        )
    placed = {
        name: jax.device_put(value, place(name, value.shape))
        for name, value in zip(names, index, strict=True)
    }
    return params | placed
