# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""python -m jtok_jax.evaluate: loss and bits per byte of a run on the whole held-out set.

    python -m jtok_jax.evaluate --workdir=runs/quickstart [--data=FOLDER] [--config.mesh.fsdp=8]

On several devices the model lies as in the run, where its mesh fits them, else split over all by
mesh.fsdp. Several processes are started as for train.py (docs/hosts.md).
"""

import argparse
import dataclasses
import os
import pathlib

import jax

from jtok_jax.config import Config, MeshConfig, TrainConfig
from jtok_jax.config_dict import add_mesh_options, add_table_options, asked_mesh, table_options
from jtok_jax.data.loader import open_source
from jtok_jax.data.manifest import parse_mixture
from jtok_jax.errors import ConfigError, DataError, exit_on_error
from jtok_jax.hosts import Hosts, code_and_versions, joined
from jtok_jax.launch import recognise
from jtok_jax.mesh import check_batches, make_mesh, replicated
from jtok_jax.model.placement import describe, fitting
from jtok_jax.store.reader import RowReader
from jtok_jax.training.evaluate import evaluate
from jtok_jax.training.guards import StallWatch
from jtok_jax.training.resume import checkpoints_of
from jtok_jax.training.saved import load_params, require_same_tokenizer
from jtok_jax.training.step import make_eval_step


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jtok_jax.evaluate", description=__doc__.splitlines()[0]
    )
    option = parser.add_argument
    option("--workdir", required=True, type=pathlib.Path, help="folder of a run of train.py")
    option("--data", default="", help="prepared corpus; default: data.path of the run")
    option("--step", default="newest", help="of a checkpoint; or newest, best; default: newest")
    option("--batch_size", type=int, help="sequences at a time; default: evaluation.batch_size")
    option("--coordinator_address", help="HOST:PORT of process 0, of several")
    option("--num_processes", type=int, help="of several; 1: this one is alone")
    option("--process_id", type=int, help="of this process, from 0")
    add_table_options(parser)
    add_mesh_options(parser)
    with exit_on_error():
        options = parser.parse_args(arguments)
        given = options.coordinator_address, options.num_processes, options.process_id
        launch = recognise(os.environ, *given)
        checkpoints_of(options.workdir)  # processes that look for each other would make the folder
        with joined(launch, options.workdir, TrainConfig()) as hosts:
            run(options, hosts)


def run(options: argparse.Namespace, hosts: Hosts) -> None:
    """Print the losses of a checkpoint."""
    hosts.agree("code and versions", code_and_versions(), ConfigError)
    asked = asked_mesh(options)
    facts = {
        "--config.mesh": asked and dataclasses.asdict(asked),
        "--batch_size": options.batch_size,
        "--step": options.step,
        "tables": table_options(options),
    }
    hosts.agree("options", facts, ConfigError)

    def choose(config: Config) -> MeshConfig:
        places = options.table_memory, options.table_folder, options.table_dtype
        return (asked or fitting(config)).tables_in(*places, run=config.mesh)

    saved = load_params(options.workdir, choose, step=options.step)
    config = _whole(saved.config, options)
    source = open_source(config)
    hosts.agree("data and checkpoint", source.fingerprint | {"step": saved.step}, DataError)
    if config.data.source == "prepared":
        folder = parse_mixture(config.data.path)[0][0]
        require_same_tokenizer(saved, source.fingerprint["tokenizer"], folder)
    mesh, size = make_mesh(config.mesh), config.evaluation.batch_size
    check_batches(config, mesh, training=False)
    if mesh.size > 1:
        hosts.say(describe(config, mesh))
    eval_step = jax.jit(make_eval_step(config, mesh), out_shardings=replicated(mesh))
    file = options.workdir / "stall-evaluate.txt"
    stall = StallWatch(file, config.train.stall_seconds, hosts.announce)
    rows_of = None
    if saved.tables:
        reader = RowReader(config, mesh, saved.tables, params=saved.params)
        saved = saved._replace(params=reader.without_indices(saved.params))  # frees the device's
        rows_of = reader.fetch
    result = evaluate(
        eval_step, saved.params, source, mesh, batch_size=size, waiting_for=stall.waiting_for,
        rows_of=rows_of,
    )  # fmt: skip
    hosts.say(f"step {saved.step}: {result:.6f}")


def _whole(config: Config, options: argparse.Namespace) -> Config:
    """Return `config` of the run, over all held-out sequences of the data asked for."""
    evaluation = dataclasses.replace(config.evaluation, max_sequences=0)
    if options.batch_size is not None:
        evaluation = dataclasses.replace(evaluation, batch_size=options.batch_size)
    data = config.data
    if options.data:
        data = dataclasses.replace(data, path=options.data, source="prepared")
    return dataclasses.replace(config, evaluation=evaluation, data=data)


if __name__ == "__main__":
    main()
