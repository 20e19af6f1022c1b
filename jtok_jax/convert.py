# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""python -m jtok_jax.convert: a model of Hugging Face as a run that the tools read.

    python -m jtok_jax.convert --from=FOLDER --output=runs/pretrained
    python -m jtok_jax.generate --workdir=runs/pretrained --prompt='The capital of France'
    python train.py --config=configs/pretrained.py:runs/pretrained --workdir=runs/more ...

FOLDER has config.json, safetensors and tokenizer.json. No code of the folder is run.
"""

import argparse
import dataclasses
import json
import pathlib
import shutil

import numpy as np

from jtok_jax.config import Config, TrainConfig
from jtok_jax.config_dict import to_dict
from jtok_jax.data import tokenizer
from jtok_jax.data.manifest import file_sha256
from jtok_jax.errors import ConfigError, WorkdirError, exit_on_error
from jtok_jax.huggingface.folder import Folder, open_folder
from jtok_jax.training.checkpoint import Checkpoints
from jtok_jax.training.resume import CONFIG_FILE, keep_tokenizer

LONGEST = 1024  # most tokens of a sequence in the run's configuration


def convert(path: pathlib.Path, output: pathlib.Path, *, dtype: str = "") -> Folder:
    """Write the model of a Hugging Face folder as a run of no steps.

    Args:
        dtype: of the parameters, "float32" or "bfloat16"; "": as stored.

    Raises:
        ConfigError: the architecture is not known, or tensors do not fit it.
        DataError: a file is missing or damaged.
        WorkdirError: `output` holds something.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise WorkdirError(f"{output} is not an empty folder. Nothing was written.")
    opened = open_folder(path, dtype=dtype)
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write(opened, partial)
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except OSError as error:
        raise WorkdirError(f"{error}. Nothing was written to {output}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return opened


def _write(opened: Folder, folder: pathlib.Path) -> None:
    length = min(opened.positions, LONGEST)
    config = Config(model=opened.config, train=TrainConfig(seq_len=length))
    (folder / CONFIG_FILE).write_text(json.dumps(to_dict(config), indent=1) + "\n")
    data, end_id = {}, None
    path = opened.path / tokenizer.FILE_NAME
    if path.is_file():
        end_id = _end_id(opened, path)
        data["tokenizer"] = file_sha256(path)
        keep_tokenizer(folder, path)
    scratch = folder / "scratch"  # in files: a model may be larger than memory
    scratch.mkdir()
    params = {}
    for name, shape in opened.shapes().items():
        file = scratch / name.replace("/", ".")
        dtype = opened.dtype(name)
        params[name] = np.memmap(file, dtype, "w+", shape=shape)
        opened.read_into(name, params[name])
    checkpoints = Checkpoints(folder, config, data=data, end_id=end_id)
    checkpoints.save_params(params)
    checkpoints.close()
    params.clear()
    shutil.rmtree(scratch)


def _end_id(opened: Folder, path: pathlib.Path) -> int:
    """Return the id of the token between documents: that of config.json, else the likeliest."""
    encoder = tokenizer.load_tokenizer(path)
    largest = max(encoder.get_vocab().values())
    if largest >= opened.config.vocab_size:
        raise ConfigError(
            f"{path} has ids up to {largest}, the model rows for {opened.config.vocab_size}: it "
            "does not belong to this model."
        )
    if opened.end_id is not None:
        return opened.end_id
    known = [one for one in tokenizer.END_TOKENS if encoder.token_to_id(one) is not None]
    return tokenizer.end_token_id(encoder, known[0] if known else tokenizer.END_TOKEN)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jtok_jax.convert", description=__doc__.splitlines()[0]
    )
    option = parser.add_argument
    option("--from", dest="path", required=True, type=pathlib.Path, help="folder to read")
    option("--output", required=True, type=pathlib.Path, help="folder of the run to write")
    option("--dtype", choices=("float32", "bfloat16"), default="", help="default: as stored")
    options = parser.parse_args(arguments)
    with exit_on_error():
        found = convert(options.path, options.output, dtype=options.dtype)
        fields = dataclasses.asdict(found.config)
        told = ("num_layers", "model_dim", "num_heads", "num_kv_heads", "ffn_dim", "vocab_size")
        print(f"{options.output}: {', '.join(f'{name} {fields[name]}' for name in told)}")


if __name__ == "__main__":
    main()
