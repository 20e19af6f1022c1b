# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Comparisons: many runs as one command, their table, and what follows from it.

A study is a file with `get_study()`, see `Study`. Results of all studies are one table.
"""

from jtok_jax.study.spec import Arm, Stage, Study

__all__ = ["Arm", "Stage", "Study"]
