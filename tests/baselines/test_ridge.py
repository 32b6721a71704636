"""A readout that is solved for, in the loop of all methods; that nothing else moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fwdlearn.allocators import Uniform
from fwdlearn.baselines import BaselineTrainer, RidgeReadout, fit_readout, is_baseline
from fwdlearn.compare.methods import plan
from fwdlearn.compare.report import notes
from fwdlearn.compare.results import summarise
from fwdlearn.data import copying_memory, delayed_recall
from fwdlearn.data.types import Data
from fwdlearn.errors import UsageError
from fwdlearn.models import Recurrent, recurrent
from fwdlearn.objectives import cross_entropy, mean_squared_error

RECALL = delayed_recall(steps=20, delay=3)
COPY = copying_memory(length=2, delay=3, symbols=4)


def _trainer(model: nn.Module, data: Data, steps: int = 12) -> BaselineTrainer:
    objective = cross_entropy if data.info.classes else mean_squared_error
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    parts = (objective, RidgeReadout(), Uniform(4), optimizer)
    return BaselineTrainer(model, data, *parts, schedule=schedule, batch_size=16, steps=steps)


def _network(data: Data) -> Recurrent:
    model = recurrent(data.info, "elman", (24,), remember=10).module
    assert isinstance(model, Recurrent)
    return model


@pytest.mark.parametrize("data", [RECALL, COPY])
@pytest.mark.filterwarnings("error")
def test_it_is_the_readout_that_all_batches_give(data: Data) -> None:
    model, other = _network(data), _network(data)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = _trainer(model, data)
    before = trainer.evaluate()
    summary = trainer.train()
    assert is_baseline(trainer.estimator) and summary["queries"] == 12 * 16
    fit_readout(other, [trainer.batch(step) for step in range(12)])
    for name, value in model.state_dict().items():
        if name.startswith("head"):
            torch.testing.assert_close(value, other.state_dict()[name])
        else:
            assert torch.equal(value, first[name])
    figure = "accuracy" if data is COPY else "nmse"
    better = summary[f"eval.{figure}"] - before[figure]
    assert better > 0.3 if data is COPY else better < -0.3


def test_any_network_that_ends_in_a_linear_layer_will_do() -> None:
    class Doubled(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = super().forward(x)
            return 2 * out

    parts = (nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1, bias=False))
    _trainer(nn.Sequential(*parts), RECALL, steps=5).train()
    with pytest.raises(
        UsageError, match="puts out what a trained nn.Linear does, and Doubled ends"
    ):
        _trainer(Doubled(*parts), RECALL).train()


RECIPES = (
    *("delayed-recall", "mackey-glass", "copying-memory", "adding-problem"),
    *("sequential-digits", "character-lm", "csv-forecast"),
)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_sequence_recipe_has_its_three_baselines(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be, " * 200)
    (tmp_path / "series.csv").write_text("load\n" + "".join(f"{i % 7}\n" for i in range(400)))
    more = {
        "character-lm": [f"data.path={tmp_path / 'text.txt'}"],
        "csv-forecast": [f"data.path={tmp_path / 'series.csv'}", "data.target=load"],
    }
    comparison = plan(recipe, more.get(recipe, []))
    labels = [method.label for method in comparison.methods]
    assert labels[1:] == ["truncated", "frozen", "backprop"]
    told = notes(summarise(comparison, (), {}))
    assert [label for label in labels if any(note.startswith(f"{label} ") for note in told)] == (
        labels[1:]
    )
