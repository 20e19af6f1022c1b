# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The jtok_jax authors
"""What a study trains: arms, stages and seeds, and the configuration of each of its runs."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import pathlib
import runpy
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jtok_jax.config import Config
from jtok_jax.config_dict import flatten, from_config_dict, to_dict
from jtok_jax.errors import ConfigError, JtokError
from jtok_jax.training.optimizer import make_optimizer

Fields = Mapping[str, object]  # {"train.steps": 10, ...}

# Must be equal in all runs that are compared; train.steps is a stage's.
SAME = ("data.", "evaluation.", "schedule.", "train.", "model.vocab_size")
OWN = ("train.seed", "train.max_unique_ids")
OF_STAGE = ("train.steps", "train.seed")  # a stage has its own
# Options of JTok-M that JTok does not read.
MIXTURE = ("model.jtok.mixture_scale_init", "model.jtok.num_tables", "model.jtok.top_k",
           "model.jtok.router_", "model.jtok.balance_")  # fmt: skip
# Where files lie and how often something is written changes no result.
PLACE = (
    "data.path", "data.read_threads", "data.prefetch", "data.verify", "checkpoint.", "logging.",
    "train.log_every", "train.stall_seconds", "train.start_seconds", "train.heartbeat_seconds",
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
            if not isinstance(values, tuple) or not values:
                raise ConfigError(f"A stage varies {key!r} over {values!r}; expected a tuple.")
            if any(isinstance(value, list | dict) for value in values):
                raise ConfigError(f"A stage varies {key!r} over {values!r}; expected plain values.")
        if self.keep < 0:
            raise ConfigError(f"A stage keeps {self.keep} candidates; expected at least 0.")
        if self.steps < 1 or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(
                f"A stage has {self.steps} steps and seeds {self.seeds}; expected at least 1 step "
                "and seeds that are each named once."
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
        if len(set(names)) < len(names):
            raise ConfigError(f"Two arms have one name: {', '.join(names)}.")
        if self.baseline not in names:
            raise ConfigError(f"The baseline {self.baseline!r} is none of {', '.join(names)}.")
        if [bool(stage.keep) for stage in self.stages] != [True] * (len(self.stages) - 1) + [False]:
            raise ConfigError("Every stage but the last chooses: `keep` at least 1, and 0 there.")
        given = [self.common, *(arm.fields for arm in self.arms)]
        varied = {key.rpartition(":")[2] for stage in self.stages for key in stage.vary}
        if of_stage := {*OF_STAGE} & varied.union(*given):
            raise ConfigError(
                f"{' and '.join(sorted(of_stage))}: every Stage has its own (`steps`, `seeds`). "
                "Remove it from `common`, from the fields of arms and from `vary`."
            )
        for stage in self.stages:
            for key in stage.vary:
                for name in key.rpartition(":")[0].split(","):
                    if name and name not in names:
                        raise ConfigError(f"{key!r} names no arm: there are {', '.join(names)}.")


class Candidate(NamedTuple):
    """An arm with chosen values of what stages vary."""

    arm: Arm
    chosen: tuple[tuple[str, object], ...]

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
        text = json.dumps([self.candidate.arm.config, sorted(self.fields.items())])
        return hashlib.sha256(text.encode()).hexdigest()[:10]

    @property
    def name(self) -> str:
        return f"{self.candidate.name}, {self.steps} steps, seed {self.seed}"


def study_name(text: str) -> str:
    """What the results of the study FILE or FILE:ARGUMENT are called."""
    path, _, argument = text.partition(":")
    return "-".join([pathlib.Path(path).stem, *([argument] if argument else [])])


def load_study(text: str) -> Study:
    """The study of FILE or FILE:ARGUMENT. Raises ConfigError if it cannot be read."""
    path, _, argument = text.partition(":")
    try:
        found = runpy.run_path(path)
        if "get_study" not in found:
            raise ConfigError(f"{path} defines no get_study().")
        study = found["get_study"](*([argument] if argument else []))
    except JtokError:
        raise
    except Exception as error:  # whatever the file raises: it is Python
        raise ConfigError(f"{text} gives no study: {error!r}.") from error
    if not isinstance(study, Study):
        raise ConfigError(f"{path} gives no study: get_study() returned {study!r}.")
    return study


def start(study: Study) -> dict[str, list[Candidate]]:
    """Candidates of every arm before the first stage."""
    return {arm.name: [Candidate(arm, ())] for arm in study.arms}


def expand(candidates: dict[str, list[Candidate]], stage: Stage) -> dict[str, list[Candidate]]:
    """Candidates of every arm in `stage`: each of those that go on with all values it varies."""
    expanded = {
        name: {
            frozenset(chosen.items()): Candidate(old.arm, tuple(chosen.items()))
            for old in of_arm
            for values in _grid(old.arm, stage)
            for chosen in [dict(old.chosen) | dict(values)]
        }
        for name, of_arm in candidates.items()
    }
    several = {name: some for name, some in expanded.items() if len(some) > 1 or not stage.keep}
    return {name: list(some.values()) for name, some in several.items()}


def going_on(candidates: list[Candidate], stage: Stage) -> list[Candidate]:
    """Those of one arm, best first, that the next stage takes."""
    return candidates[: candidates[0].arm.keep or stage.keep or None]


def cells(study: Study, stage: Stage, candidates: dict[str, list[Candidate]]) -> list[Cell]:
    """Runs of `stage`, in the order in which they are made."""
    return [
        Cell(
            candidate,
            {
                **study.common,
                **candidate.arm.fields,
                **dict(candidate.chosen),
                "train.steps": stage.steps,
                "train.seed": seed,
            },
            stage.steps,
            seed,
        )
        for seed in stage.seeds
        for of_arm in candidates.values()
        for candidate in of_arm
    ]


def resolve(cell: Cell, root: pathlib.Path, *, data: str = "") -> Config:
    """The configuration of a run, on the corpus `data` if one is given.

    Raises:
        ConfigError: the arm's file is none, a field unknown or a value impossible.
    """
    fields = dict(cell.fields) | ({"data.path": data} if data else {})
    path, _, argument = cell.candidate.arm.config.partition(":")
    if not (root / path).exists():
        raise ConfigError(
            f"Arm {cell.candidate.arm.name}: there is no {root / path}; is this the folder of the "
            "repository?"
        )
    try:
        get_config = runpy.run_path(str(root / path))["get_config"]
        values = get_config(*([argument] if argument else []))
    except Exception as error:
        raise ConfigError(f"Arm {cell.candidate.arm.name}: {root / path}: {error!r}.") from error
    known = flatten(values.to_dict())
    for key in fields:
        if key not in known:
            raise ConfigError(f"Arm {cell.candidate.arm.name}: there is no field {key!r}.")
    with named_errors(cell.name):
        values.update_from_flattened_dict(fields)
        return from_config_dict(values)


def check_study(study: Study, root: pathlib.Path, *, data: str = "") -> None:
    """Everything a study may train, before anything is: all that stages may have chosen by then.

    Raises:
        ConfigError: as `resolve`, `make_optimizer` and `require_comparable`; two candidates have
            one name.
    """
    every = start(study)
    for number, stage in enumerate(study.stages):
        if number and not stage.vary:
            continue  # steps alone differ
        every = expand(every, dataclasses.replace(stage, keep=0))
        wanted = cells(study, dataclasses.replace(stage, seeds=stage.seeds[:1]), every)
        named = {cell.name: resolve(cell, root, data=data) for cell in wanted}
        if len(named) < len(wanted):
            names = [cell.name for cell in wanted]
            twice = next(name for name in names if names.count(name) > 1)
            raise ConfigError(f"Two candidates are called {twice!r}: they differ in what it hides.")
        for name, config in named.items():
            with named_errors(name):
                make_optimizer(config)
        require_comparable(named)


@contextlib.contextmanager
def named_errors(name: str) -> Iterator[None]:
    """Context in which a wrong configuration is told with the name of the candidate or run."""
    try:
        yield
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{name}: {error}") from error


def identity(config: Config) -> dict[str, object]:
    """What decides a run's result, flat; options of what is off are left out."""
    flat = flatten(to_dict(config)) | {"schedule.steps": config.schedule_steps}
    jtok, arms = config.model.jtok.kind, config.model.arms.chosen()
    idle = ("model.ffn_dim",) if config.model.moe.num_experts else ("model.moe.",)
    idle += {"none": ("model.jtok.",), "jtok": MIXTURE, "jtok_m": ("model.jtok.gate_scale_init",)}[
        jtok
    ]
    idle += tuple(f"model.arms.{field.name}." for field in dataclasses.fields(config.model.arms)
                  if field.name not in arms)  # fmt: skip
    if not config.model.streams_read:
        idle += ("optimizer.tables.",)
    kept = {key: value for key, value in flat.items() if not key.startswith(PLACE + idle)}
    return kept | {
        "model.jtok.kind": jtok,
        "model.moe.num_experts": config.model.moe.num_experts,
    }


def digest(config: Config) -> str:
    """Of `identity`."""
    text = json.dumps(identity(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def require_comparable(named: Mapping[str, Config]) -> None:
    """Raise ConfigError if runs of one stage differ in data, tokens or evaluation."""
    (first, base), *others = named.items()
    base = _compared(base)
    lines = [
        f"  {key}: {base[key]!r} in {first}, {value!r} in {name}"
        for name, config in others
        for key, value in _compared(config).items()
        if base[key] != value
    ]
    if lines:
        raise ConfigError(
            "These runs cannot be compared:\n" + "\n".join(lines[:10]) + "\nSet such fields in "
            "`common` of the study, not in an arm."
        )


def _compared(config: Config) -> dict[str, object]:
    flat = identity(config) | {"data.path": config.data.path}
    return {k: v for k, v in flat.items() if k.startswith(SAME) and k not in OWN}


def _grid(arm: Arm, stage: Stage) -> list[list[tuple[str, object]]]:
    axes = []
    for key, values in stage.vary.items():
        only, _, field = key.rpartition(":")
        if not only or arm.name in only.split(","):
            axes.append([(field, value) for value in values])
    return [list(point) for point in itertools.product(*axes)]


def short(value: object) -> str:
    """A value for a name or a table."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
