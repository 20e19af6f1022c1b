# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""The doctor's judgement of versions and devices."""

import jax
import pytest

from jtok_jax import doctor
from jtok_jax.doctor import judge_versions, version_tuple


@pytest.mark.parametrize(
    ("jax_version", "flax_version", "backend", "bad"),
    [
        ("0.10.2", "0.12.8", "cpu", []),
        ("0.10.2", "0.12.8", "gpu", ["jax"]),
        ("0.11.1", "0.12.9", "gpu", []),
        ("0.11.2", "0.12.9", "gpu", ["flax"]),
        ("0.12.0.1", "0.12.12", "tpu", []),
        ("0.12.0.1", "0.12.8", "cpu", ["flax"]),
        ("0.9.2", "0.12.8", "cpu", ["jax"]),
        ("0.13.0", "0.12.12", "cpu", ["jax"]),
    ],
)
def test_versions_are_judged(jax_version, flax_version, backend, bad):
    findings = judge_versions(jax_version, flax_version, backend)
    assert [finding.subject for finding in findings if finding.advice] == bad


def test_version_numbers():
    assert version_tuple("0.10.2") == (0, 10, 2)
    assert version_tuple("0.12.0.1+local") == (0, 12, 0, 1)


def test_this_environment_is_ready(capsys, monkeypatch):
    doctor.main()
    out = capsys.readouterr().out
    assert out.endswith("Ready.\n")
    assert "xla (cpu is not an NVIDIA GPU)" in out
    monkeypatch.setattr(doctor, "SUPPORTED", ((9, 0), (10, 0)))
    with pytest.raises(SystemExit) as stop:
        doctor.main()
    assert stop.value.code == 1
    assert f"!!  jax               {jax.__version__}  <- outside" in capsys.readouterr().out


@pytest.mark.parametrize(("error", "says"), [
    (RuntimeError("Backend 'cuda': no GPU\nsecond line"), "'cuda': no GPU  <-"),
    (AssertionError(), "JAX finds no backend  <-"),
])  # fmt: skip
def test_a_backend_that_is_not_there_is_told(monkeypatch, error, says):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(SystemExit, match=says):
        doctor.main()
