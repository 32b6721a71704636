"""Several optimizers as one, and the recipes that ask for them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from fwdlearn.errors import FwdlearnError, UsageError
from fwdlearn.forecast import optimizer_bytes
from fwdlearn.optim import Several
from fwdlearn.recipe.build import build
from fwdlearn.recipe.load import load_recipe

RECIPE = """
model: {name: mlp, hidden: [8]}
data: digits
estimator: RandomPerturbation
optimizer:
  name: Adam
  lr: 0.01
  groups:
    "*weight": {name: Muon, lr: 0.02, weight_decay: 0.0}
    "*1.bias": {lr: 0.5}
  schedule: {name: StepLR, step_size: 1, gamma: 0.5}
trainer: {batch_size: 8, steps: 3, log_every: 1}
"""


def parts() -> tuple[nn.Parameter, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return tuple(nn.Parameter(torch.randn(s, generator=generator)) for s in ((4, 3), (3,)))  # type: ignore[return-value]


def give(params: tuple[nn.Parameter, ...], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for value in params:
        value.grad = torch.randn(value.shape, generator=generator)


def made(params: tuple[nn.Parameter, nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.Muon([params[0]], lr=0.1), torch.optim.Adam([params[1]], lr=0.2)]


def test_each_does_its_own_steps() -> None:
    one, other = parts(), parts()
    apart, together = made(one), Several(made(other))
    for seed in range(3):
        give(one, seed)
        give(other, seed)
        for optimizer in apart:
            optimizer.step()
        together.step()
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_state_that_is_loaded_goes_on() -> None:
    params = parts()
    optimizer = Several(made(params))
    give(params, 0)
    optimizer.step()
    saved, held = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    give(params, 1)
    optimizer.step()
    again = parts()
    with torch.no_grad():
        for value, kept in zip(again, held, strict=True):
            value.copy_(kept)
    other = Several(made(again))
    other.load_state_dict(saved)
    give(again, 1)
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(params, again, strict=True))


def test_what_it_will_keep_is_counted_beforehand() -> None:
    params = parts()
    kept = optimizer_bytes(Several(made(params)))
    # Muon has one moment and Adam two, and a count.
    assert kept == 4 * (12 + 2 * 3 + 1)
    assert all(p.grad is None for p in params)


def test_a_parameter_belongs_to_one() -> None:
    weight, _ = parts()
    with pytest.raises(UsageError, match="must not hold a parameter twice"):
        Several([torch.optim.SGD([weight], lr=1.0), torch.optim.Adam([weight])])
    with pytest.raises(UsageError, match="needs one at least"):
        Several([])


def test_a_recipe_gives_groups_optimizers_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    recipe = load_recipe(str(path))
    trainer = build(recipe)
    assert isinstance(trainer.optimizer, Several)
    kinds = [type(one).__name__ for one in trainer.optimizer.optimizers]
    assert kinds == ["Adam", "Muon"]
    names = {id(p): name for name, p in trainer.engine.params.items()}
    shown = [
        (group["lr"], sorted(names[id(p)] for p in group["params"]))
        for group in trainer.optimizer.param_groups
    ]
    weights = sorted(name for name in names.values() if name.endswith("weight"))
    biases = sorted(name for name in names.values() if name.endswith("bias"))
    assert shown[0][0] == 0.01 and shown[1] == (0.5, [n for n in biases if n.endswith("1.bias")])
    assert shown[2] == (0.02, weights)
    trainer.train()
    # One schedule for all.
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx(
        [0.01 / 8, 0.5 / 8, 0.02 / 8]
    )
    # What is resolved loads to the same.
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.to_yaml())
    assert load_recipe(str(resolved)).resolved() == recipe.resolved()
    assert recipe.resolved()["optimizer"]["groups"]["*weight"]["name"] == "Muon"


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ('optimizer.groups={"*weight": {name: Moun}}', "did you mean 'Muon'?"),
        ('optimizer.groups={"*weight": {name: Muon, nope: 1}}', "nope: unknown argument"),
        ('optimizer.groups={"*weight": {name: Muon, lr: -1.0}}', "Muon"),
        ('optimizer.groups={"*weight": {name: 3}}', "must be text"),
        ('optimizer.groups={"*": {name: Muon, lr: 0.1}}', "Muon"),
    ],
)
def test_what_is_wrong_with_a_group_is_said(tmp_path: Path, word: str, text: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    with pytest.raises(FwdlearnError) as raised:
        build(load_recipe(str(path), [word]))
    assert text in str(raised.value) and "optimizer.groups" in str(raised.value)
