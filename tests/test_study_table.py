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
    ("cells.csv", ",600,0,", ",600,", r"line 2 has 19 of 20 fields .*restore or remove it"),
    ("cells.csv", "\n", "\n<<<<<<< HEAD\n", "line 2 has 1 of 20 fields .a conflict of a merge"),
    ("cells.csv", ",jax\n", ",version\n", "begins with cell,.*,version; expected"),
    ("cells.csv", ",finished,", ",done,", "line 2: done with a validation loss of 3.0"),
    ("cells.csv", ",600,0,finished,3,", ",600,0,finished,nan,", "line 2: finished with .* of nan"),
    ("cells.csv", ",600,0,", ",600,7,", "says 600 steps and seed 7 of .*, which has 600 and 0"),
    ("curves.csv", "cell", "\udcff", "cannot be read"),
    ("configs.json", '"cells": {', '"cells": 3, "x": {', "is damaged .*no object"),
    ("cells.csv", "cell,arm", "arm,cell", "begins with arm,cell"),
    ("cells.csv", ",600,0,", ",6e2,0,", r"line 2: .*'6e2'"),
    ("curves.csv", "\n", "\nx,1", "line 2"),
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


def test_runs_on_other_data_are_not_added_beside_each_other(tmp_path):
    first, second = first_cells(STUDY)[:2]
    fill(tmp_path, [first], lambda _: 3.0)
    result, config, curve = finished_at(second, data="y")
    before = (tmp_path / "cells.csv").read_text()
    with pytest.raises(DataError, match="got runs with the data x meanwhile"):
        Table(tmp_path).add(result, config, curve)
    assert (tmp_path / "cells.csv").read_text() == before


def test_two_lines_of_one_run_are_refused(tmp_path):
    places = filled(tmp_path, {"dense": 3.0, "bigram": 2.5})
    path = tmp_path / "cells.csv"
    path.write_text(path.read_text() + path.read_text().splitlines()[1] + "\n")
    with pytest.raises(ConfigError, match=r"has two lines of .*; keep one"):
        Table(places.results)
