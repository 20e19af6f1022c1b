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
from jtok_jax.study.fit import published_table, write_fit
from jtok_jax.study.report import write_report
from jtok_jax.study.run import run_study
from jtok_jax.study.spec import load_study, study_name
from jtok_jax.study.timing import time_candidates
from jtok_jax.study.trainer import Paths


def main(arguments: list[str] | None = None) -> None:
    """Run one of the commands."""
    options = _parser().parse_args(arguments)
    with exit_on_error():
        print(_run(options))


def _run(options: argparse.Namespace) -> str:
    if options.command == "anatomy":
        return anatomy(options.workdir, options.output)
    if options.command == "published":
        title = "# The published scaling lines, evaluated\n\n`python -m jtok_jax.study published`"
        text = f"{title}\n\n{published_table()}\n"
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / "published-lines.md").write_text(text)
        return text
    study = load_study(options.study)
    paths = Paths(pathlib.Path.cwd(), options.runs, options.results, options.data, options.ngrams)
    if options.command == "report":
        return write_report(study, paths, options.study)
    if options.command == "fit":
        return write_fit(study, paths, options.study)
    if options.command == "time":
        return time_candidates(study, paths, study_name(options.study), rounds=options.rounds)
    last = run_study(study, paths, keep_checkpoints=options.keep_checkpoints)[-1]
    return "\n".join(
        f"{one.loss:.4f} nats/token: {one.candidate.name}, {len(one.results)} seeds"
        for ranked in last.values()
        for one in ranked
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jtok_jax.study", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(runs=pathlib.Path("runs/studies"), data="", ngrams="")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    summaries = {line.split()[0]: line[55:] for line in __doc__.splitlines()[2:]}
    subs = {name: commands.add_parser(name, help=text) for name, text in summaries.items()}
    for name in ("run", "report", "time", "fit", "published"):
        results = pathlib.Path("docs/results")
        subs[name].add_argument("--results", type=pathlib.Path, default=results, help="the table")
        if name != "published":
            subs[name].add_argument("--study", required=True, help="FILE or FILE:ARGUMENT")
    for name in ("run", "time"):
        subs[name].add_argument("--data", default="", help="prepared corpus; default: the study's")
        subs[name].add_argument("--ngrams", default="", help="file of jtok_jax.scone build")
    subs["run"].add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/studies"))
    subs["run"].add_argument("--keep_checkpoints", action="store_true", help="of finished runs")
    subs["time"].add_argument("--rounds", type=int, default=30)
    look = subs["anatomy"].add_argument
    look("--workdir", required=True, type=pathlib.Path, help="of train.py")
    look("--output", required=True, type=pathlib.Path, help="folder to write")
    return parser


if __name__ == "__main__":
    main()
