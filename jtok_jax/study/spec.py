# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""Says what a study trains: arms, stages and seeds, and the configuration of each of its runs."""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
import runpy
from collections.abc import Mapping
from typing import NamedTuple

from jtok_jax.config import Config
from jtok_jax.config_dict import flatten, from_config_dict, to_dict
from jtok_jax.errors import ConfigError, JtokError
from jtok_jax.training.optimizer import make_optimizer

Fields = Mapping[str, object]  # {"train.steps": 10, ...}

# Must be equal in all runs that are compared, but for OWN; train.steps is a stage's.
SAME = ("data.", "evaluation.", "schedule.", "train.", "model.vocab_size")
OWN = ("train.seed", "train.max_unique_ids")
OF_STAGE = {"train.steps", "train.seed"}
# Options that change nothing, by the kind of tables.
IDLE = {
    "none": ("model.jtok.",),
    "jtok": ("model.jtok.mixture_scale_init", "model.jtok.num_tables", "model.jtok.top_k",
             "model.jtok.router_", "model.jtok.balance_"),
    "jtok_m": ("model.jtok.gate_scale_init",),
}  # fmt: skip
# Where files lie and how often something is written changes no result.
PATHS = (
    "data.path", "data.ngrams", "data.read_threads", "data.prefetch", "data.verify", "checkpoint.",
    "logging.", "profile.",
    "train.log_every", "train.stall_seconds", "train.start_seconds", "train.heartbeat_seconds",
    "train.allow_changes",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arm:
    """One of what is compared: a config file, and fields on top of it.

    keep: at most so many of its candidates go on from a stage; 0: as many as the stage says.
    tried: candidates of it that another study chose from; the report counts them.
    """

    name: str
    config: str
    fields: Fields = dataclasses.field(default_factory=dict)
    keep: int = 0
    tried: int = 0


@dataclasses.dataclass(frozen=True)
class Stage:
    """Runs of every arm: all values of `vary`, each with all seeds; the best `keep` go on.

    A field named like "jtok,jtok_m:model.jtok.norm" varies in these arms alone. keep 0: nothing is
    chosen, the results are the study's. An arm with nothing to choose from skips a stage that does.
    """

    steps: int
    seeds: tuple[int, ...] = (0,)
    vary: Mapping[str, tuple] = dataclasses.field(default_factory=dict)
    keep: int = 0

    def __post_init__(self):
        for key, values in self.vary.items():
            message = f"A stage varies {key!r} over {values!r}; expected a tuple of plain values."
            _require(values and isinstance(values, tuple), message)
            _require(not any(isinstance(value, list | dict) for value in values), message)
        _require(self.keep >= 0, f"A stage keeps {self.keep} candidates; expected at least 0.")
        _require(
            self.steps >= 1 and 0 < len(self.seeds) == len(set(self.seeds)),
            f"A stage has {self.steps} steps and seeds {self.seeds}; expected at least 1 step and "
            "seeds that are each named once.",
        )


@dataclasses.dataclass(frozen=True)
class Study:
    """A grid of arms, seeds and fields.

    common: fields of all runs. stages: all but the last choose.
    baseline: the arm that others are compared with, seed by seed.
    """

    question: str
    common: Fields
    arms: tuple[Arm, ...]
    stages: tuple[Stage, ...]
    baseline: str = "dense"

    def __post_init__(self):
        names = [arm.name for arm in self.arms]
        known = ", ".join(names)
        _require(len(set(names)) == len(names), f"Two arms have one name: {known}.")
        _require(self.baseline in names, f"The baseline {self.baseline!r} is none of {known}.")
        chooses = [stage.keep > 0 for stage in self.stages]
        _require(
            chooses == [True] * (len(chooses) - 1) + [False],
            "Every stage but the last chooses: `keep` at least 1, and 0 there.",
        )
        fields = {*self.common}.union(*(arm.fields for arm in self.arms))
        for key in (key for stage in self.stages for key in stage.vary):
            only, _, field = key.rpartition(":")
            fields.add(field)
            unknown = only and {*only.split(",")} - {*names}
            _require(not unknown, f"{only!r} in `vary` names no arm: there are {known}.")
        _require(
            not fields & OF_STAGE,
            f"{' and '.join(sorted(fields & OF_STAGE))}: every Stage has its own (`steps`, "
            "`seeds`). Remove it from `common`, from the fields of arms and from `vary`.",
        )


def _require(condition: object, message: str) -> None:
    if not condition:
        raise ConfigError(message)


class Candidate(NamedTuple):
    """An arm with chosen values of what stages vary."""

    arm: Arm
    chosen: tuple[tuple[str, object], ...] = ()

    @property
    def name(self) -> str:
        values = [f"{key.rsplit('.', 1)[-1]}={short(value)}" for key, value in self.chosen]
        return " ".join([self.arm.name, *values])


class Cell(NamedTuple):
    """One run. `key` names it: a digest of the command's fields, the same in every study."""

    candidate: Candidate
    fields: Fields  # on top of the arm's config file
    steps: int
    seed: int

    @property
    def key(self) -> str:
        return short_hash([self.candidate.arm.config, sorted(self.fields.items())], 10)

    @property
    def name(self) -> str:
        return f"{self.candidate.name}, {self.steps} steps, seed {self.seed}"


def study_name(text: str) -> str:
    """Return what the results of the study FILE or FILE:ARGUMENT are called."""
    path, _, argument = text.partition(":")
    named = re.sub(r"[^\w.+-]+", "-", argument)  # which may be a path
    return pathlib.Path(path).stem + (f"-{named}" if named else "")


def load_study(text: str) -> Study:
    """Return the study of FILE or FILE:ARGUMENT. Raises ConfigError if it cannot be read."""
    study = _call_file(text, "get_study")
    _require(isinstance(study, Study), f"{text} gives no study: get_study() returned {study!r}.")
    return study


def _call_file(text: str, function: str, root: pathlib.Path = pathlib.Path()) -> object:
    """Return what `function` of the Python file returns, by FILE or FILE:ARGUMENT from `root`."""
    path, _, argument = text.partition(":")
    try:
        return runpy.run_path(str(root / path))[function](*([argument] if argument else []))
    except JtokError:
        raise
    except Exception as error:  # whatever the file raises: it is Python
        kind = function.removeprefix("get_")
        hint = " Is this the repository's folder?" * isinstance(error, FileNotFoundError)
        raise ConfigError(f"{text} gives no {kind}: {error!r}.{hint}") from error


def expand(candidates: list[Candidate], stage: Stage) -> list[Candidate]:
    """Return what a stage trains: each of `candidates` with all values that the stage varies.

    candidates: of one arm. Empty if the stage chooses and there is nothing to choose from.
    """
    found = {}  # a combination may come up twice
    for arm, chosen in candidates:
        varied = {}
        for key, values in stage.vary.items():
            only, _, field = key.rpartition(":")
            if not only or arm.name in only.split(","):
                varied[field] = values
        for values in itertools.product(*varied.values()):
            fields = dict(chosen) | dict(zip(varied, values, strict=True))
            found[arm.name, frozenset(fields.items())] = Candidate(arm, tuple(fields.items()))
    return list(found.values()) if len(found) > 1 or not stage.keep else []


def select(ranked: list[Candidate], stage: Stage) -> list[Candidate]:
    """Return the candidates of one arm, best first, that go on to the next stage."""
    return ranked[: ranked[0].arm.keep or stage.keep]


def cells(study: Study, stage: Stage, candidates: list[Candidate]) -> list[Cell]:
    """Return the runs of `stage`, in the order in which they are made."""
    found = []
    for seed, one in itertools.product(stage.seeds, candidates):
        fields = {**study.common, **one.arm.fields, **dict(one.chosen)}
        fields |= {"train.steps": stage.steps, "train.seed": seed}
        found.append(Cell(one, fields, stage.steps, seed))
    return found


def resolve(cell: Cell, root: pathlib.Path, *, data: str = "", ngrams: str = "") -> Config:
    """Return the checked configuration of a run, on the corpus `data` if one is given.

    ngrams: the file of frequent n-grams, for a model that reads them.

    Raises ConfigError: the arm's file is none, a field unknown or a value impossible.
    """
    fields = dict(cell.fields) | ({"data.path": data} if data else {})
    values = _call_file(cell.candidate.arm.config, "get_config", root)
    unknown = fields.keys() - flatten(values.to_dict()).keys()
    names = ", ".join(map(repr, sorted(unknown)))
    _require(not unknown, f"{cell.name}: there is no field {names}.")
    try:
        values.update_from_flattened_dict(fields)
        config = from_config_dict(values)
        make_optimizer(config)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{cell.name}: {error}") from error
    if ngrams and config.model.frequent_streams:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, ngrams=ngrams))
    return config


def check_study(study: Study, root: pathlib.Path, *, data: str = "", ngrams: str = "") -> None:
    """Build and compare all configurations that stages may come to train.

    Raises ConfigError: as `resolve`; runs of one stage differ in data, tokens or evaluation; two
    candidates have one name.
    """
    candidates = [Candidate(arm) for arm in study.arms]
    for number, stage in enumerate(study.stages):
        if number and not stage.vary:
            continue  # steps alone differ
        stage = dataclasses.replace(stage, keep=0, seeds=stage.seeds[:1])
        candidates = expand(candidates, stage)
        configs = {}
        for cell in cells(study, stage, candidates):
            message = f"Two candidates are called {cell.name!r}: they differ in what it hides."
            _require(cell.name not in configs, message)
            configs[cell.name] = resolve(cell, root, data=data, ngrams=ngrams)
        _require_comparable(configs)


def _require_comparable(configs: Mapping[str, Config]) -> None:
    """Raise ConfigError with the fields in which runs differ from the first but must not."""
    (first, base), *others = (
        (name, identity(config) | {"data.path": config.data.path})
        for name, config in configs.items()
    )
    lines = [
        f"  {key}: {base[key]!r} in {first}, {value!r} in {name}\n"
        for name, fields in others
        for key, value in fields.items()
        if key.startswith(SAME) and key not in OWN and base[key] != value
    ]
    advice = "Set such fields in `common` of the study, not in an arm."
    _require(not lines, f"These runs cannot be compared:\n{''.join(lines[:10])}{advice}")


def identity(config: Config) -> dict[str, object]:
    """Return what decides a run's result, flat; options of what is off are left out."""
    jtok, moe, arms = config.model.jtok.kind, config.model.moe, config.model.arms
    idle = ["model.ffn_dim" if moe.num_experts else "model.moe.", *IDLE[jtok]]
    unused = {field.name for field in dataclasses.fields(arms)} - {*arms.chosen()}
    idle += [f"model.arms.{name}." for name in unused]
    if not config.model.streams_read:
        idle.append("optimizer.tables.")
    if config.model.pattention.kind == "none":
        idle.append("model.pattention.")
    flat = flatten(to_dict(config)) | {"schedule.steps": config.schedule_steps}
    used = {key: value for key, value in flat.items() if not key.startswith((*PATHS, *idle))}
    return used | {"model.jtok.kind": jtok, "model.moe.num_experts": moe.num_experts}


def short_hash(value: object, digits: int = 12) -> str:
    """Return the first hexadecimal digits of the SHA-256 of `value` as JSON."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def short(value: object) -> str:
    """Return a value as names and tables show it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
