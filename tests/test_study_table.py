# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The table of finished runs: damaged, of older code, and with several studies at it."""

import concurrent.futures
import fcntl

import pytest
from conftest import ROOT
from pythons import oldest
from small_study import ARMS, STUDY, fill, filled, finished_at, first_cells

from jtok_jax.errors import ConfigError, DataError
from jtok_jax.study.report import write_report
from jtok_jax.study.results import Table
from jtok_jax.study.spec import resolve

pytestmark = oldest


def test_two_studies_add_to_one_table(tmp_path):
    first, second, third = first_cells(STUDY)[:3]
    tables = Table(tmp_path), Table(tmp_path)
    for table, cell in zip(tables, (first, second), strict=True):
        table.add(*finished_at(cell))
    with concurrent.futures.ThreadPoolExecutor() as threads:
        with (tmp_path / ".lock").open("a") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            adding = threads.submit(tables[0].add, *finished_at(third))
            with pytest.raises(TimeoutError):  # another is writing
                adding.result(timeout=0.3)
            assert (tmp_path / "cells.csv").read_text().count("\n") == 3
        adding.result(timeout=60)
    known = Table(tmp_path)
    assert all(known.get(cell, resolve(cell, ROOT)) for cell in (first, second, third))


@pytest.mark.parametrize(("file", "before", "after", "message"), [
    ("cells.csv", ",600,0,", ",600,", "is damaged: .*Row #2: Expected 20 columns, got 19"),
    ("cells.csv", "\n", "\n<<<<<<< HEAD\n", "Row #2: Expected 20 columns, got 1: <<<<<<< HEAD"),
    ("cells.csv", ",jax\n", ",version\n", "is damaged: .* argument 'version'"),
    ("cells.csv", "cell,arm", "cell,seed", "is damaged: "),
    ("cells.csv", ",600,0,", ",6e2,0,", "Row #2: .*'6e2'"),
    ("cells.csv", ",finished,", ",done,", "line 2: .* is done with a validation loss of 3.0"),
    ("cells.csv", ",600,0,finished,3,", ",600,0,finished,nan,", "2: .* finished with .* of nan"),
    ("cells.csv", ",600,0,", ",600,7,", "train.seed: 7 in the table, 0 now"),
    ("curves.csv", "cell", "\udcff", "is damaged: 'utf-8' codec"),
    ("curves.csv", "\n", "\nx,1\n", "Row #2"),
    ("configs.json", '"cells": {', '"cells": 3, "x": {', "is damaged .*not iterable"),
    ("configs.json", "{", "", "is damaged"),
    ("configs.json", '"model.rope_base"', '"model.rope"', "model.rope: .*, 'no such field' now"),
])  # fmt: skip
def test_damaged_tables_are_refused(file, before, after, message, tmp_path):
    places = filled(tmp_path, {"dense": 3.0, "bigram": 2.5})
    path = tmp_path / file
    text = path.read_text().replace(before, after, 1)
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError, match=message):
        write_report(STUDY, places, "x")


def test_tables_from_before_a_column_are_read_and_get_it(tmp_path):
    dense, bigram = ([c for c in first_cells(STUDY) if c.candidate.arm == arm] for arm in ARMS)
    fill(tmp_path, dense, lambda _: 3.0)
    path = tmp_path / "cells.csv"
    lines = path.read_text().splitlines()
    path.write_text("".join(line.rpartition(",")[0] + "\n" for line in lines))
    fill(tmp_path, bigram, lambda _: 2.5)
    head, *lines = path.read_text().splitlines()
    assert head.endswith(",config,jax")
    assert [line.rpartition(",")[2] for line in lines] == ["", "", "0.0", "0.0"]


def test_runs_on_other_data_are_not_added_or_read_beside_each_other(tmp_path):
    first, second = first_cells(STUDY)[:2]
    fill(tmp_path, [first], lambda _: 3.0)
    result, config, curve = finished_at(second, data="y")
    before = (tmp_path / "cells.csv").read_text()
    with pytest.raises(DataError, match=r"with the data x, y\. Losses on different texts"):
        Table(tmp_path).add(result, config, curve)
    assert (tmp_path / "cells.csv").read_text() == before
    fill(tmp_path, [second], lambda _: 2.5)
    path = tmp_path / "cells.csv"
    path.write_text(path.read_text().replace(",x,c,", ",y,c,", 1))
    with pytest.raises(DataError, match=r"with the data x, y\. Losses on different texts"):
        Table(tmp_path)


def test_two_lines_of_one_run_are_refused(tmp_path):
    filled(tmp_path, {"dense": 3.0, "bigram": 2.5})
    path = tmp_path / "cells.csv"
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    with pytest.raises(ConfigError, match=r"line 6: .* has two lines"):
        Table(tmp_path)
