# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Reads what a run or a Hugging Face folder says of its model; for files in configs/."""

import dataclasses
import json
import pathlib

from jtok_jax.config import Config
from jtok_jax.config_dict import completed, to_dict
from jtok_jax.errors import ConfigError
from jtok_jax.huggingface.config import model_config


def model_of(folder: str) -> dict:
    """Return the fields of `config.model` that a folder was written with.

    Args:
        folder: of a run, RUN or RUN@STEP, or of a Hugging Face model.

    Raises:
        ConfigError: there is no config.json, or of a model that is not known.
    """
    if not folder:
        raise ConfigError("Name the folder: --config=configs/pretrained.py:FOLDER")
    path = pathlib.Path(folder.partition("@")[0]) / "config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}); expected the folder of a run of train.py, or of a "
            "Hugging Face model."
        ) from error
    if "architectures" in values:
        return dataclasses.asdict(model_config(values))
    return completed(values.get("model", {}), to_dict(Config())["model"])
