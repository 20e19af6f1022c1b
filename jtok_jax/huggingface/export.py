# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""A run as a Hugging Face folder: a stock backbone, the tables beside it, PyTorch code for them.

config.json, model.safetensors     the backbone; several files and an index if it is large
tokenizer.json                     of the run
jtok.json, jtok.safetensors        JTok or JTok-M: "tables" [V, G, D] or [V, G, M, D], where all
                                   of an id is one run of bytes; "scale", "router" by layer
jtok_torch.py                      applies them to a model of transformers
"""

import json
import pathlib
import shutil

import numpy as np
import safetensors.numpy

from jtok_jax.errors import ConfigError
from jtok_jax.huggingface.config import to_json
from jtok_jax.huggingface.folder import CONFIG, INDEX, TABLES, WHOLE
from jtok_jax.huggingface.names import tensors
from jtok_jax.model.params import declared
from jtok_jax.model_config import ModelConfig

LARGEST = 5 << 30  # bytes of one file
OPTIONS = "jtok.json"


def export(
    folder: pathlib.Path,
    config: ModelConfig,
    params: dict[str, np.ndarray],
    *,
    positions: int,
    end_id: int | None,
) -> None:
    """Write a model into an empty folder.

    Args:
        params: logical parameters by name.
        positions: the longest sequence it was trained on.
        end_id: of the token between documents.

    Raises:
        ConfigError: the backbone is none of Hugging Face's, or has tables that are not exported.
    """
    if config.arms.chosen():
        raise ConfigError(f"model.arms.names is {config.arms.names}; arms have no exported form.")
    if config.jtok.kind != "none" and config.jtok.stream != "token":
        raise ConfigError("model.jtok.stream is not token; such tables have no exported form.")
    values = to_json(config, positions=positions, end_id=end_id)
    (folder / CONFIG).write_text(json.dumps(values, indent=1) + "\n")
    _write_backbone(folder, config, params)
    if config.jtok.kind != "none":
        (folder / OPTIONS).write_text(json.dumps(_options(config), indent=1) + "\n")
        safetensors.numpy.save_file(_tables(config, params), folder / TABLES)
        shutil.copy(pathlib.Path(__file__).with_name("jtok_torch.py"), folder)


def _write_backbone(folder: pathlib.Path, config: ModelConfig, params: dict) -> None:
    """Write the tensors, file after file of at most `LARGEST` bytes."""
    files, sizes = [[]], [0]
    for tensor in tensors(config):
        dtype = params[tensor.ours].dtype
        size = int(np.prod(tensor.their_shape)) * dtype.itemsize
        if sizes[-1] and sizes[-1] + size > LARGEST:
            files.append([])
            sizes.append(0)
        files[-1].append(tensor)
        sizes[-1] += size
    count = len(files)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    names = names if count > 1 else [WHOLE]
    for name, some in zip(names, files, strict=True):
        found = {}
        for tensor in some:
            value = params[tensor.ours]
            part = value if tensor.layer is None else value[tensor.layer]
            part = np.asarray(part)[tuple(map(slice, tensor.shape))]  # without rows of padding
            found[tensor.theirs] = np.ascontiguousarray(tensor.to_theirs(part))
        safetensors.numpy.save_file(found, folder / name, metadata={"format": "pt"})
    if count > 1:
        index = {t.theirs: name for name, some in zip(names, files, strict=True) for t in some}
        text = json.dumps({"metadata": {"total_size": sum(sizes)}, "weight_map": index}, indent=1)
        (folder / INDEX).write_text(text + "\n")


def _tables(config: ModelConfig, params: dict) -> dict[str, np.ndarray]:
    rows = np.moveaxis(np.asarray(params["tables"]), -2, 0)[: config.vocab_size]
    own = {
        name.rpartition("/")[2]: np.asarray(params[name])
        for name, one in declared(config).items()
        if one.owner and not one.is_table
    }
    return {name: np.ascontiguousarray(value) for name, value in (own | {"tables": rows}).items()}


def _options(config: ModelConfig) -> dict[str, object]:
    jtok = config.jtok
    found = {
        "kind": jtok.kind,
        "norm": jtok.norm,
        "eps": jtok.eps,
        "table_of_layer": jtok.table_of_layer(config.num_layers),
        "router_input": jtok.router_input,
        "router_norm": jtok.router_norm,
        "router_norm_eps": config.norm_eps,
    }
    if jtok.kind == "jtok_m":
        found |= {"top_k": jtok.top_k, "depth_scale": (2 * config.num_layers) ** -0.5}
    return found
