"""Updates within sequences: states and tangents go on from piece to piece."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fwdlearn.allocator import Plan
from fwdlearn.allocators import Uniform
from fwdlearn.batch import Batch
from fwdlearn.data.types import Data, DataInfo, Rows
from fwdlearn.engine.through_time import TimeEngine
from fwdlearn.errors import UsageError
from fwdlearn.estimators import (
    SPSA,
    CausalNodePerturbation,
    ForwardGradient,
    NodePerturbation,
    RandomPerturbation,
)
from fwdlearn.keys import Key
from fwdlearn.ledger.journal import RunJournal
from fwdlearn.noise import SiteNoise
from fwdlearn.objectives import mean_squared_error
from fwdlearn.step_oracle import StepOracle
from fwdlearn.steps import Carried
from fwdlearn.trainer import Trainer

from .engine.steps import MODELS, Torchs, built, numbers, sequences

STEPS = 7


def pieces(batch: Batch, every: int) -> list[Batch]:
    return [
        batch.map(lambda value, at=at: value[:, at : at + every])  # type: ignore[misc]
        for at in range(0, STEPS, every)
    ]


def full() -> Batch:
    batch = sequences(steps=STEPS)
    return Batch(batch.args, numbers("full", 4, STEPS, 2))


@pytest.mark.parametrize("every", [1, 3, 7])
@pytest.mark.parametrize("name", ["gru", "lstm", "feedback", "learned", "torchs"])
def test_losses_and_slopes_of_pieces_add_up(name: str, every: int) -> None:
    """With weights that stay as they are, the pieces are the whole; each has its own mean."""
    models = MODELS | {"torchs": Torchs}
    batch, engine = full(), TimeEngine(built(models[name]), mean_squared_error)
    plan, estimators = Plan.uniform(4, 3), [SPSA(0.3), ForwardGradient()]
    for estimator in estimators[: 1 if name == "learned" else 2]:

        def ask(oracle: StepOracle, estimator: Any = estimator) -> tuple[float, dict[str, Tensor]]:
            made, _ = estimator.estimate(oracle, oracle.params, None, key=Key.root(2), plan=plan)
            return float(made.loss), {name: made.grad[name] for name in oracle.params}

        loss, grad = ask(StepOracle(engine, batch))
        carried, losses, grads = (
            Carried(),
            0.0,
            {name: torch.zeros_like(g) for name, g in grad.items()},
        )
        for piece in pieces(batch, every):
            oracle = StepOracle(engine, piece)
            oracle.go_on(carried)
            own, parts = ask(oracle)
            carried, share = oracle.carried, piece.targets.shape[1] / STEPS
            losses += own * share
            for key, value in parts.items():
                grads[key] += value * share
        assert carried.steps == STEPS
        assert losses == pytest.approx(loss, rel=1e-10)
        for key, value in grad.items():
            torch.testing.assert_close(grads[key], value, rtol=1e-8, atol=1e-12)


def test_moments_go_on_from_clean_states_with_noise_of_their_own() -> None:
    batch, engine = full(), TimeEngine(built(MODELS["gru"]), mean_squared_error)
    whole, row = StepOracle(engine, batch), torch.arange(4)
    sites = whole.step_sites
    asked: list[int] = []

    def noise(step: int) -> SiteNoise:
        asked.append(step)
        return SiteNoise(Key.root(3).fold(step), sites, 4)

    clean = torch.stack([m.clean for m in whole.moments(row, noise, row, 0.0)])
    asked.clear()
    carried, found = Carried(), []
    for piece in pieces(batch, 3):
        oracle = StepOracle(engine, piece)
        oracle.go_on(carried)
        for moment in oracle.moments(row, noise, row, 0.0):
            torch.testing.assert_close(moment.losses, moment.clean)
            found.append(moment.clean * piece.targets.shape[1] / STEPS)
        carried = oracle.carried
    torch.testing.assert_close(torch.stack(found), clean)
    assert asked == list(range(STEPS))


def trainer(estimator: Any = None, allocator: Any = None, **settings: Any) -> Trainer:
    model = built(MODELS["elman"])
    x, y = numbers("x", 12, STEPS, 2), numbers("y", 12, STEPS, 2)
    info = DataInfo("sequence", (STEPS, 2), None, values=2, per_step=True)
    return Trainer(
        model,
        Data(info, Rows(x, y)),
        mean_squared_error,
        estimator or RandomPerturbation(),
        allocator or Uniform(4),
        torch.optim.SGD(model.parameters(), lr=0.1),
        **{"batch_size": 4, "steps": 9, "every": 3, **settings},
    )


def test_batches_are_pieces_of_one_batch_and_directions_stay() -> None:
    made, whole = trainer(), trainer(every=None)
    for step in range(9):
        piece = made.batch(step)
        begin = step % 3 * 3
        expected = whole.batch(step // 3).args[0][:, begin : begin + 3]
        assert torch.equal(piece.args[0], expected)
        assert made.step_key(step) == whole.step_key(step // 3)
    assert made.batch(2).args[0].shape[1] == 1


@pytest.mark.parametrize(
    "estimator",
    [RandomPerturbation(), ForwardGradient(guess="momentum"), CausalNodePerturbation(horizon=2)],
    ids=lambda e: type(e).__name__,
)
def test_it_trains_in_pieces(estimator: Any) -> None:
    made = trainer(estimator, steps=60)
    before = made.evaluate(made.data.train)["loss"]
    summary = made.train()
    assert made.evaluate(made.data.train)["loss"] < before
    assert summary["queries"] == 60 * (4 * 4 + 4)


@dataclass(frozen=True)
class Growing(Uniform):
    """One direction more at each step."""

    def init(self) -> Any:
        return 0

    def allocate(self, rows: int, signals: Any, state: Any, *, key: Key) -> tuple[Plan, Any]:
        return Plan.uniform(rows, 1 + state), state + 1


def test_what_cannot_go_on_is_refused() -> None:
    with pytest.raises(UsageError, match="NodePerturbation takes whole sequences"):
        trainer(NodePerturbation())
    with pytest.raises(UsageError, match="such as Uniform"):
        trainer(allocator=Growing()).train()
    model = built(MODELS["elman"])
    data = Data(DataInfo("sequence", (3, 2), 2), Rows(torch.zeros(4, 3, 2), torch.zeros(4).long()))
    with pytest.raises(UsageError, match="each step must have a target"):
        Trainer(
            model,
            data,
            mean_squared_error,
            SPSA(),
            Uniform(1),
            torch.optim.SGD(model.parameters(), lr=0.1),
            steps=1,
            every=2,
        )


@pytest.mark.parametrize("seconds", [0.0, 1e9], ids=["snapshots", "ledger-alone"])
@pytest.mark.parametrize(
    "estimator", [SPSA(), ForwardGradient(guess="momentum")], ids=["losses", "slopes"]
)
def test_a_run_that_stopped_within_a_sequence_goes_on(
    tmp_path: Path, estimator: Any, seconds: float
) -> None:
    """Bit for bit as if it had not stopped: what is carried is in the snapshot, or made again."""

    def weights(folder: Path, steps: int) -> dict[str, Tensor]:
        folder.mkdir(exist_ok=True)
        journal = RunJournal(folder, {}, seconds=seconds)
        made = trainer(estimator, steps=steps, journal=journal)
        try:
            made.train()
        finally:
            journal.close()
        return {name: value.detach().clone() for name, value in made.model.named_parameters()}

    whole = weights(tmp_path / "whole", 8)
    weights(tmp_path / "parts", 4)
    again = weights(tmp_path / "parts", 8)
    assert all(torch.equal(again[name], value) for name, value in whole.items())
