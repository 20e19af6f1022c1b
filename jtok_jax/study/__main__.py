# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""python -m jtok_jax.study: compare, report, look into what was trained.

run      --study=configs/studies/X.py --data=FOLDER    train what is not in the table yet
report   --study=configs/studies/X.py                  means, intervals, plots
"""

import argparse
import pathlib

from jtok_jax.errors import exit_on_error
from jtok_jax.study.run import Places, run_study
from jtok_jax.study.spec import load_study

RESULTS = pathlib.Path("docs/results")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m jtok_jax.study", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train what is not in the table yet")
    run.add_argument("--study", required=True, type=pathlib.Path)
    run.add_argument("--data", default="", help="prepared corpus; default: that of the study")
    run.add_argument("--runs", type=pathlib.Path, default=pathlib.Path("runs/studies"))
    run.add_argument("--results", type=pathlib.Path, default=RESULTS)
    run.add_argument("--keep_checkpoints", action="store_true", help="of finished runs")
    options = parser.parse_args(arguments)
    with exit_on_error():
        study = load_study(options.study)
        root = pathlib.Path.cwd()
        places = Places(root, options.runs, options.results, options.data)
        stages = run_study(study, places, keep_checkpoints=options.keep_checkpoints)
        for name, ranked in stages[-1].items():
            for one in ranked:
                print(f"{one.loss:.4f} nats/token: {one.candidate.name} ({name})")


if __name__ == "__main__":
    main()
