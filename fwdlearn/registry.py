"""Names of components, and where each one lives, without importing any of them.

A component is a registered name or `module:attribute`. Packages add names through entry points of
the groups `fwdlearn.estimators`, `fwdlearn.models`, ... (the plural of the kind). Nothing here
imports torch.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from fwdlearn.errors import MissingError, UsageError

# One line each, because torch's own are for readers of equations. LBFGS is left out (it asks for
# the loss again inside its step), and so is SparseAdam.
_OPTIMIZERS = {
    "SGD": "Gradient descent, with momentum if asked.",
    "Adam": "Adaptive moments: a step of about lr for every weight.",
    "AdamW": "Adam with decoupled weight decay.",
    "Adamax": "Adam with the largest recent gradient in place of the second moment.",
    "NAdam": "Adam with Nesterov momentum.",
    "RAdam": "Adam with a rectified start.",
    "Adafactor": "Adaptive, with second moments kept as rows and columns.",
    "Adadelta": "Adaptive, without a learning rate to choose.",
    "Adagrad": "Adaptive, with steps that shrink as gradients add up.",
    "ASGD": "Gradient descent with averaged weights.",
    "Muon": "Momentum made orthogonal; for matrices alone.",
    "RMSprop": "Gradients divided by their recent size.",
    "Rprop": "Signs of gradients alone; for whole batches.",
}

# Left out: schedules that take callables or other schedules, or that wait for a metric.
_SCHEDULES = {
    "ConstantLR": "A constant factor for the first total_iters steps.",
    "CosineAnnealingLR": "Half a cosine from lr to eta_min over T_max steps.",
    "CosineAnnealingWarmRestarts": "Half cosines again and again, the first over T_0 steps.",
    "CyclicLR": "Up and down between base_lr and max_lr.",
    "ExponentialLR": "Times gamma after every step.",
    "LinearLR": "A straight line from start_factor to end_factor over total_iters steps.",
    "MultiStepLR": "Times gamma at each of the milestones.",
    "OneCycleLR": "Up to max_lr and down again, once over total_steps.",
    "PolynomialLR": "Down to zero over total_iters steps, with a power.",
    "StepLR": "Times gamma after every step_size steps.",
}

BUILT_IN: dict[str, dict[str, str]] = {
    "estimator": {
        "NodePerturbation": "fwdlearn.estimators:NodePerturbation",
        "ActivityNodePerturbation": "fwdlearn.estimators:ActivityNodePerturbation",
        "IterativeNodePerturbation": "fwdlearn.estimators:IterativeNodePerturbation",
        "CausalNodePerturbation": "fwdlearn.estimators:CausalNodePerturbation",
        "RTRL": "fwdlearn.estimators:RTRL",
        "PerturbationThroughTime": "fwdlearn.estimators:PerturbationThroughTime",
        "StepwiseActivityPerturbation": "fwdlearn.estimators:StepwiseActivityPerturbation",
        "StepwiseWeightPerturbation": "fwdlearn.estimators:StepwiseWeightPerturbation",
        "RandomPerturbation": "fwdlearn.estimators:RandomPerturbation",
        "SPSA": "fwdlearn.estimators:SPSA",
        "LOZO": "fwdlearn.estimators:LOZO",
        "AIMZO": "fwdlearn.estimators:AIMZO",
        "HiZOO": "fwdlearn.estimators:HiZOO",
        "LikelihoodRatio": "fwdlearn.estimators:LikelihoodRatio",
        "ApproximateLikelihoodRatio": "fwdlearn.estimators:ApproximateLikelihoodRatio",
        "ForwardGradient": "fwdlearn.estimators:ForwardGradient",
        "ActivityForwardGradient": "fwdlearn.estimators:ActivityForwardGradient",
        "ProjectedForwardGradient": "fwdlearn.estimators:ProjectedForwardGradient",
    },
    "allocator": {
        name: f"fwdlearn.allocators:{name}"
        for name in (
            "Uniform",
            "Neyman",
            "GaussianAllocator",
            "BernoulliAllocator",
            "ConfidenceSkip",
            "AdaptiveDirections",
            "MeasuredSharing",
            "Blocks",
        )
    },
    "model": {
        name: f"fwdlearn.models:{name}"
        for name in ("mlp", "cnn", "vit", "recurrent", "transformers", "prompted")
    },
    "data": {
        name: f"fwdlearn.data:{name}"
        for name in (
            *("digits", "idx", "npz", "csv", "jsonl", "image_folder", "sequential_digits"),
            *("delayed_recall", "copying_memory", "adding_problem", "mackey_glass"),
            *("characters", "csv_series"),
            *("corpus", "completions", "chats", "label_words", "multiple_choice"),
        )
    },
    "objective": {
        name: f"fwdlearn.objectives:{name}"
        for name in (
            "cross_entropy",
            "mean_squared_error",
            "zero_one",
            "returned",
            "class_f1",
            "score",
        )
    },
    "metric": {
        name: f"fwdlearn.scoring:{name}"
        for name in ("accuracy", "exact_match", "f1", "without_letter")
    },
    "optimizer": {name: f"torch.optim:{name}" for name in _OPTIMIZERS}
    | {name: f"fwdlearn.optim:{name}" for name in ("FrankWolfe", "NormalizedSGD")},
    "set": {
        name: f"fwdlearn.optim.sets:{name}"
        for name in (
            "L1Ball",
            "L2Ball",
            "LInfBall",
            "LpBall",
            "KSparsePolytope",
            "NuclearBall",
            "SpectralBall",
            "Simplex",
            "Box",
        )
    },
    "schedule": {name: f"torch.optim.lr_scheduler:{name}" for name in _SCHEDULES},
    "sink": {
        "wandb": "fwdlearn.sinks.wandb:Wandb",
        "tensorboard": "fwdlearn.sinks.tensorboard:Tensorboard",
    },
}

KINDS = tuple(BUILT_IN)

SUMMARIES = _OPTIMIZERS | _SCHEDULES
"""What to say of names whose source does not say it well."""


@dataclass(frozen=True)
class Entry:
    """A registered name.

    Args:
        kind: one of `KINDS`.
        name: what a recipe says.
        targets: `module:attribute`; more than one when packages claim the same name.
        owners: the packages that registered it, in the order of `targets`.
    """

    kind: str
    name: str
    targets: tuple[str, ...]
    owners: tuple[str, ...]

    @property
    def target(self) -> str:
        """The one target. Raises UsageError, naming the owners, when there are several."""
        if len(self.targets) > 1:
            claims = " and ".join(
                f"{owner} ({target})"
                for owner, target in zip(self.owners, self.targets, strict=True)
            )
            raise UsageError(
                f"the {self.kind} name {self.name!r} is claimed by {claims}; write the one you "
                "mean as module:attribute, or uninstall the other package."
            )
        return self.targets[0]


@cache
def entries(kind: str) -> dict[str, Entry]:
    """Name -> entry, built-in ones first, then those of installed packages."""
    found = {
        name: Entry(kind, name, (target,), ("fwdlearn",)) for name, target in BUILT_IN[kind].items()
    }
    group = f"fwdlearn.{kind}" if kind == "data" else f"fwdlearn.{kind}s"
    for point in entry_points(group=group):
        owner = point.dist.name if point.dist is not None else point.value
        known = found.get(point.name, Entry(kind, point.name, (), ()))
        # The same package is seen twice when its metadata lies in two places of the path.
        if (owner, point.value) not in zip(known.owners, known.targets, strict=True):
            found[point.name] = Entry(
                kind, point.name, (*known.targets, point.value), (*known.owners, owner)
            )
    return found


def target_of(kind: str, name: str) -> str:
    """The `module:attribute` behind a registered name or behind itself.

    Raises:
        UsageError: unknown name (with the nearest one), a clash, or a malformed target.
    """
    if ":" in name:
        module, _, attribute = name.partition(":")
        words = [*module.split("."), *attribute.split(".")]
        if all(word.isidentifier() for word in words):
            return name
        raise UsageError(f"{name!r} is not of the form package.module:attribute")
    known = entries(kind)
    if name not in known:
        raise UsageError(f"unknown {kind} {name!r}; {suggest(name, known)}")
    return known[name].target


def load(target: str) -> Any:
    """Imports `module:attribute`.

    Raises:
        MissingError: the module or something that it imports is not installed.
        UsageError: the module has no such attribute, or is not importable.
    """
    module_name, _, attributes = target.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise MissingError(
            f"{target}: no module named {error.name!r}; install the package that holds it, or "
            "put its folder on PYTHONPATH"
        ) from error
    except (ImportError, SyntaxError) as error:
        raise UsageError(f"{target}: its module cannot be imported: {error}") from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            near = suggest(attribute, [name for name in dir(found) if not name.startswith("_")])
            raise UsageError(f"{target}: {found.__name__} has no {attribute!r}; {near}")
        found = getattr(found, attribute)
    return found


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that `word` was most likely meant to be, or None."""
    by_lower = {choice.lower(): choice for choice in choices}
    # One slip of the fingers is a likeness that no share of common letters shows in short words.
    slips = {near: choice for near, choice in by_lower.items() if _one_slip(word.lower(), near)}
    cutoff = 0.0 if slips else 0.6
    close = difflib.get_close_matches(word.lower(), slips or by_lower, n=1, cutoff=cutoff)
    return by_lower[close[0]] if close else None


def _one_slip(one: str, other: str) -> bool:
    """Whether a letter is wrong, missing, additional or exchanged with the next one."""
    short, long = sorted((one, other), key=len)
    same = next(
        (i for i, pair in enumerate(zip(short, long, strict=False)) if len(set(pair)) > 1),
        len(short),
    )
    rest, more = short[same:], long[same:]
    if len(rest) < len(more):
        return rest == more[1:]
    return rest[1:] == more[1:] or rest[:2] == more[1::-1] and rest[2:] == more[2:]


def suggest(word: str, choices: Iterable[str], most: int = 12) -> str:
    """`did you mean 'x'?`, or the choices when none is near."""
    names = list(choices)
    near = nearest(word, names)
    if near is not None:
        return f"did you mean {near!r}?"
    if not names:
        return "there is nothing to choose from here"
    shown = ", ".join(names[:most]) + (", ..." if len(names) > most else "")
    return f"choose from {shown}"
