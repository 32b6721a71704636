"""The sections that are the same in every recipe, and their checks. Imports no torch."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fwdlearn.recipe.annotations import expressible, shown, words
from fwdlearn.recipe.source import Path, Problem
from fwdlearn.registry import nearest, suggest

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

Count = Annotated[int, Field(ge=1)]


def as_bytes(value: object) -> object:
    """`2 GiB` as a number of bytes; other values as they are."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", value)
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"must be bytes, or a size such as 2 GiB, got {value!r}")
    return round(float(found[1]) * _UNITS[found[2].upper()])


def _device(value: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", value) is None:
        raise ValueError(f"must be auto, cpu, cuda or cuda:N, got {value!r}")
    return value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class TrainerSection(_Section):
    """How long and how often. Exactly one of `steps` and `queries` is given."""

    batch_size: Count = Field(default=32, description="rows of a step")
    steps: Count | None = Field(default=None, description="optimizer steps")
    queries: Count | None = Field(default=None, description="budget: forward passes of one row")
    every: Count | None = Field(
        default=None, description="steps of a sequence between updates; the state is carried on"
    )
    evaluate_every: Count | None = Field(default=None, description="steps between evaluations")
    evaluation_batch_size: Count = Field(default=256, description="rows of an evaluation pass")
    bucket: Count = Field(
        default=1, description="batches that are sorted by length together; 1 sorts nothing"
    )
    log_every: Count = Field(default=10, description="steps between log records")
    train_mode: bool = Field(default=False, description="dropout and batch norm as in training")
    device: Annotated[str, AfterValidator(_device)] = Field(
        default="auto", description="auto, cpu, cuda or cuda:N"
    )
    rung: str = Field(default="auto", description="how perturbed passes run; auto chooses")
    memory_budget: Annotated[Count | None, BeforeValidator(as_bytes)] = Field(
        default=None, description="bytes that a block of queries may take, or text such as 2 GiB"
    )
    compile: bool = Field(default=False, description="run folded passes as compiled graphs")
    offload: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="where weights wait for their use: cpu (memory), or a folder"
    )
    divergence: Annotated[float, Field(gt=0)] | None = Field(
        default=10.0,
        description="a loss so many times its size (1 at least) above the first has diverged",
    )


class OutputSection(_Section):
    """Where the run goes."""

    dir: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="the run's folder; runs/<recipe> when not given"
    )
    overwrite: bool = Field(default=False, description="replace a run that is there already")
    snapshot_seconds: Annotated[float, Field(ge=0)] = Field(
        default=60.0, description="between snapshots, at least; what a crash makes run again"
    )


Seed = Annotated[int, Field(ge=0, lt=2**63)]

SAME = ("model", "data", "seed", "output", "compare", "estimator")
"""Sections that `with` of a compared method cannot change."""


def _method(value: Any) -> Any:
    """One of `compare.estimators`, as a mapping; see `CompareSection`."""
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, dict):
        raise ValueError(f"must be a name, or `name:` and arguments, got {shown(value)}")
    for key, kind, what in (
        ("name", str, "text"),
        ("as", str, "text, what tables call it"),
        ("with", dict, "settings of the recipe, such as {allocator.directions: 8}"),
    ):
        if key in value and not isinstance(value[key], kind):
            raise ValueError(f"`{key}` must be {what}, got {shown(value[key])}")
    for key in value.get("with", {}):
        section = key.partition(".")[0]
        if section in SAME or key in ("trainer.steps", "trainer.queries"):
            raise ValueError(f"`with` cannot change {key}: methods are compared at the same one")
    return value


def _distinct(values: list[Any]) -> list[Any]:
    if not values:
        raise ValueError("must hold at least one")
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"has {shown(value)} twice; keep one")
    return values


class CompareSection(_Section):
    """What `fwdlearn compare` trains; `train` passes over it.

    An item of `estimators` is a name, or a mapping: `name` (the recipe's own estimator when left
    out), its arguments, `as` (what tables call it) and `with` (settings of the recipe that differ
    for it). The last two are words of Python, so no argument can have their names.
    """

    estimators: Annotated[
        list[Annotated[Any, AfterValidator(_method)]], AfterValidator(_distinct)
    ] = Field(default=[{}], description="what is compared; the recipe's own when not given")
    seeds: Annotated[list[Seed], AfterValidator(_distinct)] = Field(
        default=[0, 1, 2], description="of the runs of each method"
    )
    lrs: Annotated[list[Annotated[float, Field(gt=0)]], AfterValidator(_distinct)] | None = Field(
        default=None, description="learning rates to try, the recipe's own when not given"
    )
    backprop: bool = Field(default=True, description="whether backpropagation runs beside them")


class Fixed(_Section):
    """What a recipe holds beside its components."""

    trainer: TrainerSection
    output: OutputSection = OutputSection()
    compare: CompareSection = CompareSection()
    seed: Seed = 0


_FIXED: dict[str, type[BaseModel]] = {
    "trainer": TrainerSection,
    "output": OutputSection,
    "compare": CompareSection,
}
REQUIRED = ("model", "data", "estimator", "optimizer", "trainer")
SECTIONS = (
    "model data objective estimator allocator optimizer trainer output tracking metrics seed "
    "compare"
).split()


def check_fixed(data: dict[str, Any]) -> tuple[Fixed | None, list[Problem]]:
    """Checks the section names and the fixed sections."""
    problems = [_unknown(key, data) for key in data if key not in SECTIONS]
    for name in REQUIRED:
        if data.get(name) is None:
            message = "missing; every recipe needs this section"
            problems.append(Problem((name,), message, "key" if name not in data else "value"))
    part = {name: data[name] for name in Fixed.model_fields if data.get(name) is not None}
    problems += _check_length(data.get("trainer"))
    try:
        fixed = Fixed.model_validate({"trainer": {}} | part)
    except ValidationError as error:
        return None, problems + [_explain(each, data) for each in error.errors(include_url=False)]
    return fixed, problems


def _check_length(trainer: Any) -> list[Problem]:
    """Exactly one of steps and queries, also when other keys are wrong."""
    if not isinstance(trainer, dict):
        return []
    given = [key for key in ("steps", "queries") if trainer.get(key) is not None]
    if len(given) == 2:
        message = "given together with trainer.steps; remove one of the two"
        return [Problem(("trainer", "queries"), message, "key")]
    known = TrainerSection.model_fields
    # A misspelt one is reported as an unknown key, and that is enough.
    meant = [nearest(key, known) for key in trainer if key not in known]
    if not given and not {"steps", "queries"} & set(meant):
        return [Problem(("trainer",), "neither steps nor queries is given; give one", "key")]
    return []


def _unknown(key: str, data: dict[str, Any]) -> Problem:
    inside = [
        f"{section}.{key}"
        for section, content in data.items()
        if isinstance(content, dict) and (key in content or key in _fields(section))
    ]
    way = f"did you mean {inside[0]!r}?" if inside else suggest(key, SECTIONS)
    return Problem((key,), f"unknown section; {way}", "key")


def _fields(section: str) -> list[str]:
    model = _FIXED.get(section)
    return list(model.model_fields) if model is not None else []


def _explain(error: Any, data: dict[str, Any]) -> Problem:
    path: Path = tuple(error["loc"])
    if error["type"] == "extra_forbidden":
        known = _fields(str(path[0]))
        return Problem(path, f"unknown key; {suggest(str(path[-1]), known)}", "key")
    value: Any = data
    for part in path:
        if isinstance(part, int) or isinstance(value, dict):
            value = value[part] if isinstance(part, int) else value.get(part)
    if error["type"] in ("model_type", "model_attributes_type"):
        return Problem(path, f"must be keys and values, got {shown(value)}")
    if error["type"] == "value_error":
        return Problem(path, str(error["ctx"]["error"]))
    if "ctx" in error:
        return Problem(path, error["msg"].replace("Input should", "must") + f", got {shown(value)}")
    return Problem(path, f"must be {_expected(path)}, got {shown(value)}")


def _expected(path: Path) -> str:
    model = _FIXED[str(path[0])] if len(path) > 1 else Fixed
    keys = [part for part in path if isinstance(part, str)]
    expected = words(expressible(model.model_fields[keys[-1]].annotation)).removesuffix(" or null")
    return expected.removeprefix("a list, each ") if isinstance(path[-1], int) else expected
