"""Names, entry points, clashes, suggestions."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from fwdlearn import registry
from fwdlearn.errors import MissingError, UsageError
from fwdlearn.recipe.definitions import definition


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[SimpleNamespace]]:
    """Entry points of the group fwdlearn.estimators, as (name, value, owner)."""
    found: list[SimpleNamespace] = []
    groups = {"fwdlearn.estimators": found}
    monkeypatch.setattr(registry, "entry_points", lambda group: groups.get(group, []))
    registry.entries.cache_clear()
    yield found
    registry.entries.cache_clear()


def _point(name: str, value: str, owner: str) -> SimpleNamespace:
    return SimpleNamespace(name=name, value=value, dist=SimpleNamespace(name=owner))


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in registry.KINDS for name in registry.entries(kind)]
)
def test_every_name_leads_somewhere(kind: str, name: str) -> None:
    target = registry.target_of(kind, name)
    assert callable(registry.load(target))
    found = definition(target)
    assert found is not None
    assert found.summary or name in registry.SUMMARIES


def test_torch_has_no_optimizer_that_is_forgotten() -> None:
    known = {*registry.entries("optimizer"), "LBFGS", "SparseAdam", "Optimizer"}
    classes = [name for name in torch.optim.__all__ if isinstance(getattr(torch.optim, name), type)]
    assert set(classes) <= known


def test_packages_add_names(points: list[SimpleNamespace]) -> None:
    points.append(_point("Mine", "pkg.mod:Mine", "pkg"))
    assert registry.target_of("estimator", "Mine") == "pkg.mod:Mine"


def test_a_clash_names_both_owners(points: list[SimpleNamespace]) -> None:
    points.append(_point("SPSA", "pkg.mod:SPSA", "pkg"))
    with pytest.raises(UsageError) as caught:
        registry.target_of("estimator", "SPSA")
    assert str(caught.value) == (
        "the estimator name 'SPSA' is claimed by fwdlearn (fwdlearn.estimators:SPSA) and pkg "
        "(pkg.mod:SPSA); write the one you mean as module:attribute, or uninstall the other "
        "package."
    )
    assert registry.target_of("estimator", "pkg.mod:SPSA") == "pkg.mod:SPSA"
    assert registry.target_of("estimator", "RandomPerturbation")


def test_the_same_package_seen_twice_is_no_clash(points: list[SimpleNamespace]) -> None:
    points += [_point("Mine", "pkg.mod:Mine", "pkg")] * 2
    assert registry.target_of("estimator", "Mine") == "pkg.mod:Mine"


@pytest.mark.parametrize(
    ("word", "way"),
    [
        ("spsa", "did you mean 'SPSA'?"),
        ("RandomPertubation", "did you mean 'RandomPerturbation'?"),
        ("zzz", "choose from RandomPerturbation, SPSA"),
    ],
)
def test_suggestions(word: str, way: str) -> None:
    assert registry.suggest(word, ["RandomPerturbation", "SPSA"]) == way


def test_load_says_what_is_missing() -> None:
    with pytest.raises(MissingError, match="no module named 'nosuchpackage'"):
        registry.load("nosuchpackage.sub:Thing")
    with pytest.raises(UsageError, match="has no 'jsom'"):
        registry.load("json:jsom")


def test_definitions_need_no_import() -> None:
    found = definition("torch.optim:Adam")
    assert found is not None and found.parameters is not None
    assert found.parameters["params"] and not found.parameters["lr"]
    assert definition("no.such.module:Thing") is None
