# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Limits that keep the project small enough to hold in one's head."""

import ast
import re
import tomllib

import pytest
from conftest import ROOT

FOLDERS = ("jtok_jax", "kernels", "configs", "tests", "benchmarks")
FILES = [ROOT / "train.py", *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path):
    text = path.read_text()
    lines = len(text.splitlines())
    assert lines <= 400, lines
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, (node.name, length)


def test_readme_is_short_and_names_what_exists():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 110
    assert len(text.split()) <= 900
    for name in ("LICENSE", "LOG.md", "CONTRIBUTING.md", "docs/block.svg", "docs/method.md"):
        assert (ROOT / name).exists(), name
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would shadow an installed package


def test_reported_problems_name_tests_that_exist():
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "reports.md").read_text())
    files = (ROOT / "tests").glob("*.py")
    defined = {name for file in files for name in re.findall(r"def (test_\w+)", file.read_text())}
    assert len(named) > 40
    assert not set(named) - defined


def test_a_wheel_has_every_package():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {path.parent.relative_to(ROOT) for path in (ROOT / "jtok_jax").rglob("__init__.py")}
    assert {*told} == {".".join(path.parts) for path in found} | {"jtok_kernels"}
