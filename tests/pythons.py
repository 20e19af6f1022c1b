# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The time of the two Pythons of CI is shared: what does not depend on the version runs on one."""

import os

import jax
import pytest

OLD, NIGHTLY = jax.version.__version_info__ < (0, 11), bool(os.environ.get("NIGHTLY"))
newest = pytest.mark.skipif(OLD and not NIGHTLY, reason="runs on the newer Python, or NIGHTLY=1")
oldest = pytest.mark.skipif(not (OLD or NIGHTLY), reason="runs on Python 3.11, or NIGHTLY=1")
