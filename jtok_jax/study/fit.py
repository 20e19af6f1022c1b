# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""What size of dense model each arm is worth: N_eff, gamma and how it depends on eta and rho.

All runs of a study see the same tokens, so the baseline's losses over its sizes are one line, log
loss over log parameters; the size at which it meets an arm's loss is N_eff = N_c (1 + eta gamma),
Eq. 14 of arXiv 2602.00800. N_c is all of the backbone: the paper does not say whether embedding
and head count.
"""

from typing import NamedTuple

import numpy as np

from jtok_jax.errors import ConfigError
from jtok_jax.study.run import Ranked, StageResults, finished
from jtok_jax.study.scaling import PowerLaw, fit_gamma, gamma, power_law
from jtok_jax.study.spec import Study, cells, resolve, study_name
from jtok_jax.study.trainer import Places

SIZES = 3  # of the baseline, at least


class Worth(NamedTuple):
    """Of one candidate, mean over seeds."""

    name: str
    loss: float
    eta: float  # parameters of tables over those of the backbone
    rho: float  # K / n_e of JTok-M, 1 of JTok
    gain: float  # N_eff / N_c
    inside: bool  # N_eff is among the baseline's sizes; else extrapolated


def write_fit(study: Study, places: Places, file: str) -> str:
    """Markdown, also as RESULTS/NAME-fit.md.

    The arms that share the baseline's config file are its sizes.

    Raises:
        ConfigError: fewer than `SIZES` of these, or runs are missing.
    """
    (*_, last), lacking = finished(study, places)
    if lacking:
        raise ConfigError(f"Runs are missing: {'; '.join(lacking[:3])} ... Run the study first.")
    line, found = worth(study, last, places)
    lines = [
        f"# {study.question}",
        f"`python -m jtok_jax.study fit --study={file}`. Baseline: loss = "
        f"2^({line.intercept:.4f} {line.slope:+.4f} log10 N), r2 {line.r2:.4f}. N_eff: the size at "
        "which it has the arm's loss; * beyond the sizes trained. eta: parameters of tables over "
        "N_c, the backbone. gamma = (N_eff / N_c - 1) / eta.",
        "| candidate | val loss | eta | rho | N_eff / N_c | gamma |\n|---|---|---|---|---|---|",
    ]
    for one in found:
        value = f"{gamma(one.gain, one.eta):.3f}" if one.eta else ""
        beyond = "" if one.inside else " *"
        lines[-1] += (
            f"\n| {one.name} | {one.loss:.4f} | {one.eta:.2f} | {one.rho:.2f} "
            f"| {one.gain:.3f}{beyond} | {value} |"
        )
    lines.append(_gamma_law([one for one in found if one.eta and one.gain > 1]))
    text = "\n\n".join(lines) + "\n"
    (places.results / f"{study_name(file)}-fit.md").write_text(text)
    return text


def worth(study: Study, last: StageResults, places: Places) -> tuple[PowerLaw, list[Worth]]:
    """The baseline's line over its sizes, and what every other candidate is worth on it."""
    (base,) = [arm for arm in study.arms if arm.name == study.baseline]
    sizes = {arm.name for arm in study.arms if arm.config == base.config}
    dense = [last[name][0] for name in sizes]
    counts = np.array([one.results[0].backbone for one in dense])
    if len(set(counts.tolist())) < SIZES:
        raise ConfigError(
            f"The baseline {study.baseline} has {len(set(counts.tolist()))} sizes (arms of "
            f"{base.config}); a line through them needs {SIZES}."
        )
    try:
        line = power_law(counts, np.array([one.loss for one in dense]))
    except ValueError as error:
        raise ConfigError(f"No line through the baseline's sizes: {error}") from error
    found = []
    for one in [one for name, some in last.items() if name not in sizes for one in some]:
        first, size = one.results[0], float(line.compute(one.loss))  # over N, not over FLOPs
        inside = bool(counts.min() <= size <= counts.max())
        eta, gain = first.tables / first.backbone, size / first.backbone
        found.append(
            Worth(one.candidate.name, one.loss, eta, _rho(study, one, places), gain, inside)
        )
    return line, found


def _rho(study: Study, one: Ranked, places: Places) -> float:
    (first, *_) = cells(study, study.stages[-1], {"": [one.candidate]})
    jtok = resolve(first, places.root).model.jtok
    return jtok.top_k / jtok.num_tables if jtok.kind == "jtok_m" else 1.0


def _gamma_law(found: list[Worth]) -> str:
    try:
        law = fit_gamma(*(np.array([getattr(o, n) for o in found]) for n in ("eta", "rho", "gain")))
    except ValueError as error:
        return f"No law of gamma over eta and rho: {error}"
    return (
        f"gamma = {law.scale:.3f} eta^{law.eta_exponent:.3f} rho^{law.rho_exponent:.3f}, r2 "
        f"{law.r2:.3f}, over {len(found)} candidates; the form is ours, the paper gives none."
    )
