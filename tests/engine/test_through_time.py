"""Passes step by step are those of the whole sequence, in the memory of one step."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.engine.footprint import LiveBytes
from fwdlearn.engine.through_time import TimeEngine
from fwdlearn.errors import UsageError
from fwdlearn.keys import Key
from fwdlearn.noise import GivenNoise, SiteNoise
from fwdlearn.objectives import cross_entropy, mean_squared_error
from fwdlearn.oracle import ModelOracle
from fwdlearn.step_oracle import StepOracle

from .steps import MODELS, Mixing, Stepwise, Torchs, built, cell, numbers, sequences

ROW = torch.tensor([0, 0, 1, 2, 2, 3])
NUMBER = torch.tensor([0, 1, 2, 0, 3, 4])


def family(engine: Any, rank: int | None = 1) -> Directions:
    return Directions(Key.root(1), dict(engine.params), 5, "rademacher", rank)


@pytest.mark.parametrize("rank", [1, None])
@pytest.mark.parametrize("name", list(MODELS))
def test_losses_and_slopes_are_those_of_the_whole(name: str, rank: int | None) -> None:
    model, batch = built(MODELS[name]), sequences()
    stepped, whole = TimeEngine(model, mean_squared_error), Engine(model, mean_squared_error)
    directions = family(whole, rank)
    with torch.inference_mode():
        for scale in (0.0, 0.3):
            found = stepped.losses(batch, ROW, directions, NUMBER, scale)
            torch.testing.assert_close(
                found, whole.losses(batch, ROW, directions, NUMBER, scale), rtol=1e-10, atol=0
            )
        assert stepped.choice is not None and stepped.choice.rung == "fold", stepped.choice
        if name == "learned":
            return
        for one, other in zip(
            stepped.slopes(batch, ROW, directions, NUMBER),
            whole.slopes(batch, ROW, directions, NUMBER),
            strict=True,
        ):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_what_the_dual_cannot_follow_has_slopes_by_torchs_own_forward_mode() -> None:
    model, batch = built(Torchs), sequences()
    engine = TimeEngine(model, mean_squared_error)
    engine.choose(batch)
    directions = family(engine)
    with torch.inference_mode():
        losses, slopes = engine.slopes(batch, ROW, directions, NUMBER)
    assert engine.choice is not None
    assert "exact slopes by jvp (dual: Input batch size 1" in engine.choice.reason
    tangents = {name: directions.dense(name, torch.arange(5)) for name in engine.params}

    def loss(row: int, params: dict[str, Tensor]) -> Tensor:
        rows = batch.select(torch.tensor([row]))
        out = torch.func.functional_call(model, params, rows.args)
        return mean_squared_error(out, rows.targets)[0]

    weights = {name: value.detach() for name, value in engine.params.items()}
    for query, (row, number) in enumerate(zip(ROW.tolist(), NUMBER.tolist(), strict=True)):
        moved = {name: value[number] for name, value in tangents.items()}
        plain, slope = torch.func.jvp(partial(loss, row), (weights,), (moved,))
        torch.testing.assert_close(losses[query], plain, rtol=1e-10, atol=0)
        torch.testing.assert_close(slopes[query], slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", list(MODELS))
def test_a_batch_of_another_length_needs_no_new_trace(name: str) -> None:
    model = built(MODELS[name])
    stepped, whole = TimeEngine(model, mean_squared_error), Engine(model, mean_squared_error)
    directions = family(whole)
    with torch.inference_mode():
        for steps in (7, 2, 12):
            batch = sequences(steps=steps)
            batch.targets.nan_to_num_(0.5)
            torch.testing.assert_close(
                stepped.losses(batch, ROW, directions, NUMBER, 0.3),
                whole.losses(batch, ROW, directions, NUMBER, 0.3),
            )


def test_a_target_for_the_whole_belongs_to_the_last_step() -> None:
    model = built(cell("gru", 4))
    model.last = True  # type: ignore[assignment]
    batch = Batch((numbers("x", 3, 6, 2),), torch.tensor([0, 1, 1]))
    stepped, whole = TimeEngine(model, cross_entropy), Engine(model, cross_entropy)
    with torch.inference_mode():
        torch.testing.assert_close(stepped.evaluate(batch), whole.evaluate(batch))
        row = torch.tensor([2, 0])
        slopes = stepped.slopes(batch, row, family(whole), row)[1]
        torch.testing.assert_close(slopes, whole.slopes(batch, row, family(whole), row)[1])


def test_the_reference_is_asked_for_by_name() -> None:
    model, batch = built(MODELS["lstm"]), sequences()
    fold = TimeEngine(model, mean_squared_error, rung="fold")
    reference = TimeEngine(model, mean_squared_error, rung="sequential")
    with torch.inference_mode():
        torch.testing.assert_close(
            fold.losses(batch, ROW, family(fold), NUMBER, 0.1),
            reference.losses(batch, ROW, family(fold), NUMBER, 0.1),
        )
    assert reference.choice is not None and reference.choice.rung == "sequential"


def test_what_the_fold_gets_wrong_steps_down_and_says_so() -> None:
    engine = TimeEngine(built(Mixing), mean_squared_error)
    choice = engine.choose(sequences())
    assert choice.rung == "sequential" and "differs from the reference" in choice.reason
    with pytest.raises(UsageError, match="rung 'fold' was asked for"):
        TimeEngine(built(Mixing), mean_squared_error, rung="fold").choose(sequences())


class Hiding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def initial(self, rows: int) -> dict[str, Tensor]:
        return {"h": self.layer.weight.new_zeros(rows, 2)}

    def step(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        h = self.layer(x) + state["h"]
        return h, {"h": torch.tensor(h.tolist(), dtype=h.dtype)}


def test_a_hidden_derivative_is_refused() -> None:
    engine = TimeEngine(built(Hiding), mean_squared_error)
    with torch.no_grad(), pytest.raises(UsageError, match="Hiding gives no exact slopes"):
        engine.slopes(sequences(), ROW, family(engine), NUMBER)


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        (Batch((torch.zeros(2),), torch.zeros(2)), r"one input \[rows, steps, ...\], got \(2,\)"),
        (Batch((), torch.zeros(2)), "got none"),
        (Batch((torch.zeros(2, 3, 2),), torch.zeros(2, 4, 2)), "as many steps"),
    ],
)
def test_batches_of_another_form_are_refused(batch: Batch, match: str) -> None:
    engine = TimeEngine(built(MODELS["gru"]), mean_squared_error)
    with pytest.raises(UsageError, match=match):
        engine.losses(batch, torch.tensor([0]))


def test_settings_out_of_range_are_refused() -> None:
    for settings in ({"rung": "copies"}, {"compile": True}, {"memory_budget": 0}):
        with pytest.raises(UsageError):
            TimeEngine(built(MODELS["gru"]), mean_squared_error, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["losses", "slopes", "moments"])
def test_memory_is_that_of_one_step(what: str) -> None:
    """Beside the batch itself: as many live bytes at 60 steps as at 20."""
    # Little enough that sequences of 20 do not run whole.
    engine = TimeEngine(built(cell("elman", 8)), mean_squared_error, memory_budget=2**14)

    def peak(steps: int) -> int:
        batch = Batch((numbers("x", 4, steps, 2),), numbers("y", 4, steps, 2))
        run(batch)
        with LiveBytes(torch.device("cpu")) as live:
            run(batch)
        return live.peak

    def run(batch: Batch) -> None:
        oracle = StepOracle(engine, batch)
        if what == "losses":
            oracle.losses(ROW, family(engine), NUMBER, 0.1)
        elif what == "slopes":
            oracle.slopes(ROW, family(engine), NUMBER)
        else:
            sites = oracle.step_sites
            for _ in oracle.moments(ROW, lambda t: SiteNoise(Key(t, 0), sites, 5), NUMBER, 0.1):
                pass

    # Which steps count is looked at in parts, a few bytes a step.
    allowed = 40 * 4 * 8
    assert peak(60) - peak(20) < allowed


@pytest.mark.parametrize("name", list(MODELS))
def test_short_sequences_run_whole_to_the_same_losses(name: str) -> None:
    model, batch = built(MODELS[name]), sequences()
    answers = []
    for budget in (None, 1):
        engine = TimeEngine(model, mean_squared_error, memory_budget=budget)
        answers.append(engine.losses(batch, ROW, family(engine), NUMBER, 0.1))
        # What has not run whole has not been looked at as a whole.
        assert ("_whole" in vars(engine)) == (budget is None)
    torch.testing.assert_close(*answers)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "learned"])
def test_moments_add_up_to_noise_in_the_whole(name: str) -> None:
    """Noise at each step's layers is noise at the layers of the unrolled network."""
    model, batch = built(MODELS[name]), sequences()
    stepped = StepOracle(TimeEngine(model, mean_squared_error), batch)
    whole = ModelOracle(Engine(Stepwise(model), mean_squared_error), batch)
    sites, key, count = stepped.step_sites, Key.root(2), 5

    def noise(step: int) -> SiteNoise:
        return SiteNoise(key.fold(step), sites, count)

    losses = torch.zeros(len(ROW), dtype=torch.float64)
    clean = torch.zeros(4, dtype=torch.float64)
    values: dict[str, Tensor] = {}
    ids = torch.arange(count)
    for moment in stepped.moments(ROW, noise, NUMBER, 0.2):
        losses += moment.losses
        clean += moment.clean
        for site in sites:
            place = f"{site}#{moment.step}" if moment.step else site
            values[place] = noise(moment.step).dense(site, ids)
    assert stepped.queries == len(ROW) + 4
    assert set(values) == set(whole.sites)
    torch.testing.assert_close(losses, whole.noisy_losses(ROW, GivenNoise(values), NUMBER, 0.2))
    torch.testing.assert_close(clean, whole.losses(torch.arange(4)))


def test_gathered_products_are_those_of_the_whole() -> None:
    model, batch = built(MODELS["lstm"]), sequences()
    stepped = StepOracle(TimeEngine(model, mean_squared_error), batch)
    whole = ModelOracle(Engine(Stepwise(model), mean_squared_error), batch)
    sites, total, cotangents = stepped.step_sites, {}, {}
    none = ROW[:0]
    for moment in stepped.moments(none, lambda t: SiteNoise(Key(t, 0), sites, 1), none, 0.0):
        own = {site: numbers(f"{site}{moment.step}", 4, *sites[site].shape) for site in sites}
        for site, value in own.items():
            cotangents[f"{site}#{moment.step}" if moment.step else site] = value
        for parameter, value in moment.gather(own).items():
            total[parameter] = total[parameter] + value if parameter in total else value
    torch.testing.assert_close(total, dict(whole.gather(cotangents)))


def test_the_head_is_exact_unless_it_comes_back() -> None:
    batch = sequences()
    model = built(MODELS["gru"])
    oracle = StepOracle(TimeEngine(model, mean_squared_error), batch)
    assert oracle.step_head() == "head.weight"
    sites, none = oracle.step_sites, ROW[:0]
    output = model(batch.args[0]).detach().requires_grad_()
    mean_squared_error(output, batch.targets).sum().backward()
    for moment in oracle.moments(none, lambda t: SiteNoise(Key(t, 0), sites, 1), none, 0.0):
        torch.testing.assert_close(moment.exact["head.weight"], output.grad[:, moment.step])
    back = StepOracle(TimeEngine(built(MODELS["feedback"]), mean_squared_error), batch)
    assert back.step_head() is None


def test_a_learned_first_state_has_no_layer() -> None:
    oracle = StepOracle(TimeEngine(built(MODELS["learned"]), mean_squared_error), sequences())
    assert list(oracle.step_left_out) == ["start"]
