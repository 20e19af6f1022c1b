# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""python -m jtok_jax.study: compare, report, look into what was trained.

run      --study=configs/studies/X.py --data=FOLDER    train what is not in the table yet
report   --study=configs/studies/X.py                  means, intervals, plots
time     --study=configs/studies/X.py --data=FOLDER    steps of its last stage, in turn
fit      --study=configs/studies/X.py                  what size of dense model each arm is worth
anatomy  --workdir=DIR --output=FOLDER                 what the tables of a run look like
published                                              what the paper's two scaling lines imply
"""

import argparse
import pathlib

from jtok_jax.errors import exit_on_error
from jtok_jax.study.anatomy import anatomy
from jtok_jax.study.fit import write_fit
from jtok_jax.study.report import write_report
from jtok_jax.study.run import run_study
from jtok_jax.study.scaling import published_table
from jtok_jax.study.spec import load_study, study_name
from jtok_jax.study.timing import time_candidates
from jtok_jax.study.trainer import Places


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    with exit_on_error():
        options.run(options)


def _run(options: argparse.Namespace) -> None:
    places = Places(pathlib.Path.cwd(), options.runs, options.results, options.data)
    study = load_study(options.study)
    stages = run_study(study, places, keep_checkpoints=options.keep_checkpoints)
    for ranked in stages[-1].values():
        for one in ranked:
            print(f"{one.loss:.4f} nats/token: {one.candidate.name}, {len(one.results)} seeds")


def _report(options: argparse.Namespace) -> None:
    places = Places(pathlib.Path.cwd(), pathlib.Path(), options.results)
    print(write_report(load_study(options.study), places, options.study))


def _fit(options: argparse.Namespace) -> None:
    places = Places(pathlib.Path.cwd(), pathlib.Path(), options.results)
    print(write_fit(load_study(options.study), places, options.study))


def _time(options: argparse.Namespace) -> None:
    places = Places(pathlib.Path.cwd(), pathlib.Path(), options.results, options.data)
    study, name = load_study(options.study), study_name(options.study)
    print(time_candidates(study, places, name, rounds=options.rounds))


def _anatomy(options: argparse.Namespace) -> None:
    print(anatomy(options.workdir, options.output, removed=options.removed))


def _published(options: argparse.Namespace) -> None:
    title = "# The published scaling lines, evaluated\n\n`python -m jtok_jax.study published`"
    text = f"{title}\n\n{published_table()}\n"
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "published-lines.md").write_text(text)
    print(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jtok_jax.study", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )  # fmt: skip
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="train what is not in the table yet")
    run.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/studies"))
    run.add_argument("--keep_checkpoints", action="store_true", help="of finished runs")
    run.set_defaults(run=_run)
    timed = commands.add_parser("time", help="steps of what the last stage trains, paired")
    timed.add_argument("--rounds", type=int, default=30)
    timed.set_defaults(run=_time)
    report = commands.add_parser("report", help="means, intervals and plots of a finished study")
    report.set_defaults(run=_report)
    published = commands.add_parser("published", help="what the paper's two scaling lines imply")
    published.set_defaults(run=_published)
    fit = commands.add_parser("fit", help="what size of dense model each arm is worth")
    fit.set_defaults(run=_fit)
    looked = commands.add_parser("anatomy", help="what the trained tables of a run look like")
    looked.add_argument("--workdir", required=True, type=pathlib.Path, help="of train.py")
    looked.add_argument("--output", required=True, type=pathlib.Path, help="folder to write")
    looked.add_argument("--removed", type=int, default=40, help="frequent tokens to try without")
    looked.set_defaults(run=_anatomy)
    for command in (run, timed):
        command.add_argument("--data", default="", help="prepared corpus; default: the study's")
    for command in (run, timed, report, fit):
        command.add_argument("--study", required=True, help="FILE or FILE:ARGUMENT")
    for command in (run, timed, report, fit, published):
        command.add_argument("--results", type=pathlib.Path, default=pathlib.Path("docs/results"))
    return parser


if __name__ == "__main__":
    main()
