# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A Hugging Face folder, read tensor by tensor: config.json and safetensors, nothing that runs."""

import json
import pathlib
from typing import NamedTuple

import numpy as np
import safetensors

from jtok_jax.errors import ConfigError, DataError
from jtok_jax.huggingface.config import model_config
from jtok_jax.huggingface.names import tensors
from jtok_jax.model.params import declared
from jtok_jax.model_config import ModelConfig

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
WHOLE = "model.safetensors"  # of a model in one file
TABLES = "jtok.safetensors"  # that `export` writes beside a backbone
IGNORED = ("rotary_emb.inv_freq",)  # buffers that older files hold
DTYPES = ("F32", "F16", "BF16")


class Folder(NamedTuple):
    """An opened folder, whose tensors are known to be those of `config`."""

    path: pathlib.Path
    config: ModelConfig
    files: dict[str, str]  # tensor -> file
    positions: int  # the longest sequence it was trained on
    end_id: int | None  # of the token that ends a text; None: not said

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each of our parameters that it holds."""
        ours = {tensor.ours for tensor in tensors(self.config)}
        return {name: one.shape for name, one in declared(self.config).items() if name in ours}

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of one of our parameters."""
        return np.dtype(declared(self.config)[name].dtype)

    def parameter(self, name: str) -> np.ndarray:
        """Return one of our parameters, all layers of it."""
        found = np.zeros(self.shapes()[name], self.dtype(name))
        self.read_into(name, found)
        return found

    def read_into(self, name: str, found: np.ndarray) -> None:
        """Write one of our parameters into zeros; rows of padding stay zero.

        Raises:
            DataError: its bytes cannot be read, or it has a NaN or an infinity.
        """
        for tensor in tensors(self.config):
            if tensor.ours != name:
                continue
            file = self.path / self.files[tensor.theirs]
            with _open(file) as stored:
                value = stored.get_tensor(tensor.theirs)
            if not np.isfinite(value.sum(dtype=np.float64)):
                raise DataError(f"{file}: {tensor.theirs} is not finite; fetch the file again.")
            value = tensor.to_ours(value)
            part = found if tensor.layer is None else found[tensor.layer]
            part[tuple(map(slice, value.shape))] = value


def is_folder(path: pathlib.Path) -> bool:
    """Return whether `path` holds a model of Hugging Face rather than a run."""
    return (path / CONFIG).is_file() and not (path / "checkpoints").exists()


def open_folder(path: pathlib.Path, *, dtype: str = "") -> Folder:
    """Return a folder after comparing names, shapes and dtypes with its config.json.

    Args:
        dtype: of our parameters; "": as stored.

    Raises:
        ConfigError: the model is none that is known, or differs from its config.json.
        DataError: a file is missing, damaged or of another kind.
    """
    values = _json(path / CONFIG)
    try:
        config = model_config(values, dtype=dtype)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if (path / TABLES).exists():
        raise ConfigError(
            f"{path} has {TABLES}: tables, which are not read from there. Use the run that was "
            "written, or move that file away to take the backbone alone."
        )
    index, found = _index(path), {}
    for file in sorted(set(index.values())) or [WHOLE]:
        with _open(path / file) as stored:
            for name in stored.keys():  # noqa: SIM118, which is no dict
                part = stored.get_slice(name)
                found[name] = tuple(part.get_shape()), part.get_dtype(), file
    _compare(path, config, found, index)
    end_id = values.get("eos_token_id")
    end_id = end_id[0] if isinstance(end_id, list) and end_id else end_id
    files = {name: file for name, (_, _, file) in found.items()}
    return Folder(path, config, files, values.get("max_position_embeddings") or 1024, end_id)


def _compare(path: pathlib.Path, config: ModelConfig, found: dict, index: dict) -> None:
    wanted = {one.theirs: one.their_shape for one in tensors(config)}
    spare = {name for name in found if name.endswith(IGNORED)}
    spare |= {"lm_head.weight"} if config.head == "tied" else set()
    problems = [f"{name}: missing" for name in wanted.keys() - found.keys()]
    problems += [f"{name}: not of this model" for name in found.keys() - wanted.keys() - spare]
    problems += [
        f"{name}: the index says {file}, it is in {found[name][2]}"
        for name, file in index.items()
        if name in found and found[name][2] != file
    ]
    for name in wanted.keys() & found.keys():
        shape, dtype, _ = found[name]
        if shape != wanted[name]:
            problems.append(f"{name}: {list(shape)}, {CONFIG} gives {list(wanted[name])}")
        if dtype not in DTYPES:
            problems.append(f"{name}: {dtype}, expected {', '.join(DTYPES)}")
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        lines = "\n  ".join(sorted(problems)[:20])
        raise ConfigError(f"{path}: tensors do not fit {CONFIG}:\n  {lines}{more}")


def _index(path: pathlib.Path) -> dict[str, str]:
    """Return the file of every tensor; {} where there is one file and no index."""
    if not (path / INDEX).exists():
        if not (path / WHOLE).is_file():
            pickles = [one.name for one in (*path.glob("*.bin"), *path.glob("*.pt*"))][:3]
            also = f" {', '.join(pickles)}: not read, as it can run code." if pickles else ""
            raise DataError(f"{path} has neither {INDEX} nor {WHOLE}.{also}")
        return {}
    index = _json(path / INDEX).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise DataError(f"{path / INDEX} has no weight_map.")
    for file in sorted(set(map(str, index.values()))):
        if pathlib.PurePath(file).name != file:
            raise DataError(f"{path / INDEX} names {file!r}, which leaves the folder. Refused.")
        if not (path / file).is_file():
            raise DataError(f"{path / INDEX} names {file}, which is missing; fetch it again.")
    return index


def _json(path: pathlib.Path) -> dict:
    if not path.is_file():
        raise DataError(f"{path} is missing; expected the folder of a Hugging Face model.")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}).") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} holds no JSON object.")
    return values


def _open(path: pathlib.Path):
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"{path} cannot be read: {error}. Fetch it again.") from error
