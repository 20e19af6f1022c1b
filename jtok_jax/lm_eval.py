# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""python -m jtok_jax.lm_eval: tasks of EleutherAI's lm-evaluation-harness on a run.

    python -m jtok_jax.lm_eval --workdir=runs/quickstart --tasks=lambada_openai,hellaswag
    python -m jtok_jax.lm_eval --workdir=runs/quickstart --tasks=own --include_path=my_tasks

Needs pip install -e '.[lm-eval]'. Tasks fetch their data, but those that name local files.
"""

import argparse
import importlib
import json
import pathlib

from jtok_jax.config_dict import add_table_options, table_options
from jtok_jax.errors import ConfigError, DataError, exit_on_error


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jtok_jax.lm_eval", description=__doc__.splitlines()[0]
    )
    option = parser.add_argument
    option("--workdir", required=True, type=pathlib.Path, help="folder of a run of train.py")
    option("--tasks", required=True, help="names, with commas between them")
    option("--include_path", help="folder with tasks of your own, as YAML")
    option("--step", default="newest", help="of a checkpoint; or newest, best (newest)")
    option("--batch_size", type=int, default=16, help="texts at a time (16)")
    option("--max_length", type=int, default=0, help="tokens of a text; default: train.seq_len")
    option("--num_fewshot", type=int, help="examples before each question; default: the task's")
    option("--limit", type=float, help="documents of each task; below 1: a share; default: all")
    option("--gen_kwargs", help="of generated texts, such as max_gen_toks=64")
    option("--no_bos_token", action="store_true", help="begin contexts without the end token")
    option("--output", type=pathlib.Path, help="file for all results, as JSON")
    add_table_options(parser)
    with exit_on_error():
        run(parser.parse_args(arguments))


def run(options: argparse.Namespace) -> None:
    """Print the harness's table of results."""
    try:
        harness = importlib.import_module("jtok_jax.harness")
        evaluator, tasks, utils = (
            importlib.import_module(f"lm_eval.{name}") for name in ("evaluator", "tasks", "utils")
        )
    except ImportError as error:
        raise ConfigError(f"{error}. Run pip install -e '.[lm-eval]'.") from error
    if options.include_path and not pathlib.Path(options.include_path).is_dir():
        raise ConfigError(f"--include_path={options.include_path} is not a folder.")
    if options.output:  # before hours of scoring
        options.output.parent.mkdir(parents=True, exist_ok=True)
    known = tasks.TaskManager(include_path=options.include_path)
    names = options.tasks.split(",")
    if unknown := set(names) - set(known.all_tasks):
        raise ConfigError(
            f"There is no task {', '.join(sorted(unknown))}. `lm_eval ls tasks` lists those of the "
            "harness; --include_path adds your own."
        )
    model = harness.JtokLM(
        options.workdir,
        options.step,
        options.batch_size,
        not options.no_bos_token,
        options.max_length,
        **table_options(options),
    )
    try:
        results = evaluator.simple_evaluate(
            model,
            tasks=names,
            task_manager=known,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            gen_kwargs=options.gen_kwargs,
        )
    except FileNotFoundError as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"The data of {options.tasks} is not there: {reason}") from error
    print(utils.make_table(results))
    if options.output:
        text = json.dumps(results, indent=1, default=str, ensure_ascii=False)
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
