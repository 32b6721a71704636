"""The fold equals the sequential reference, for every model of the matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine, rules
from fwdlearn.engine.blocks import Blocks
from fwdlearn.errors import UsageError
from fwdlearn.factors import Factors
from fwdlearn.keys import Key

from .models import CASES, Case, built, cross_entropy, series, tokens

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
KINDS = [("rademacher", 1), ("gaussian", 2), ("rademacher", None)]
ROW = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5])
DIRECTION = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1, 9])


def both(model: nn.Module, case: Case, batch: Batch, law: str, rank: int | None, scale: Tensor):
    folded = Engine(model, case.objective)
    reference = Engine(model, case.objective, rung="sequential")
    family = Directions(Key.root(1), dict(folded.params), 10, law, rank)
    with torch.inference_mode():
        one = folded.losses(batch, ROW, family, DIRECTION, scale)
        other = reference.losses(batch, ROW, family, DIRECTION, scale)
        clean = reference.losses(batch, ROW)
    assert folded.choice is not None and folded.choice.rung == "fold", folded.choice
    return one, other, clean


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["float64", "float32"])
@pytest.mark.parametrize("name", list(CASES))
def test_fold_equals_sequential(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    batch = case.batch(6).to("cpu", dtype)
    scale = torch.linspace(-0.03, 0.03, len(ROW), dtype=torch.float64)
    for law, rank in KINDS:
        model = built(name, dtype)
        folded, reference, clean = both(model, case, batch, law, rank, scale)
        torch.testing.assert_close(folded, reference, rtol=TOLERANCE[dtype], atol=0)
        # The comparison means something only if the perturbation is seen, in every query.
        assert ((reference - clean).abs() > 100 * TOLERANCE[dtype] * clean).all() or (
            dtype == torch.float32 and ((reference - clean).abs() > 1e-5).all()
        )


@pytest.mark.parametrize("name", list(CASES))
def test_parameters_that_a_family_lacks_stay_as_they_are(name: str) -> None:
    """Every other one is left out; those that are there move as in the family of all of them."""
    case, model = CASES[name], built(name)
    batch, scale = case.batch(6).to("cpu", torch.float64), torch.full((len(ROW),), 0.02).double()
    losses = []
    for rung in ("fold", "copies", "sequential"):
        engine = Engine(model, case.objective, rung=rung)
        try:
            with torch.inference_mode():
                engine.choose(batch)
        except UsageError:
            # Not every model runs under vmap.
            assert rung == "copies"
            continue
        some = dict(list(engine.params.items())[::2])
        family = Directions(Key.root(1), some, 10)
        with torch.inference_mode():
            losses.append(engine.losses(batch, ROW, family, DIRECTION, scale))
            clean = engine.losses(batch, ROW)
    for one in losses[1:]:
        torch.testing.assert_close(losses[0], one, rtol=1e-10, atol=0)
    assert (losses[0] != clean).any()


@pytest.mark.parametrize("name", list(CASES))
def test_every_parameter_is_perturbed_where_it_is_used(name: str) -> None:
    """One parameter at a time, so that a small one cannot hide behind the others."""
    case, model = CASES[name], built(name)
    batch = case.batch(4).to("cpu", torch.float64)
    row = torch.arange(4)
    folded = Engine(model, case.objective)
    reference = Engine(model, case.objective, rung="sequential")
    with torch.inference_mode():
        clean = reference.losses(batch, row)
        for parameter in folded.params:
            zeroed = _Only(Directions(Key.root(2), dict(folded.params), 4), parameter)
            one = folded.losses(batch, row, zeroed, row, 0.1)
            other = reference.losses(batch, row, zeroed, row, 0.1)
            change = (other - clean).abs().max()
            torch.testing.assert_close(one, other, rtol=1e-10, atol=0, msg=parameter)
            if change > 1e-9:
                assert (one - clean).abs().max() > change / 2, parameter


class _Only(Directions):
    """A family whose directions are zero but in one parameter."""

    def __init__(self, family: Directions, name: str) -> None:
        super().__init__(family.key, family.params, family.count, family.law, None)
        object.__setattr__(self, "only", name)

    def at(self, ids: Tensor | slice, together: bool = True) -> _Changed:
        kept = self.only  # type: ignore[attr-defined]
        return _Changed(self, ids, lambda name, value: value if name == kept else value * 0)


class _Changed(Factors):
    """Dense directions with something done to them."""

    def __init__(self, family: Directions, ids: Tensor | slice, change: Any) -> None:
        super().__init__(family, ids)
        self.change = change

    def __getitem__(self, name: str) -> Tensor:
        value = super().__getitem__(name)
        assert isinstance(value, Tensor)
        return self.change(name, value)


@pytest.mark.parametrize("copies", [True, False], ids=["copied", "corrected"])
@pytest.mark.parametrize("name", list(CASES))
def test_queries_that_share_their_directions(
    name: str, copies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of rows at one point, whole or cut by blocks, of one size or several."""
    monkeypatch.setattr(rules, "copy_pays", lambda x, m: copies)
    case, model = CASES[name], built(name)
    batch = case.batch(6).to("cpu", torch.float64)
    row, direction = torch.arange(6).repeat(4), torch.arange(4).repeat_interleave(6)
    mixed = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    signs = torch.tensor([0.03, -0.03], dtype=torch.float64).repeat(12)
    asked = [
        (row, direction, torch.tensor(0.03)),
        (row[mixed], direction[mixed], torch.tensor(0.03)),
        (row, direction, signs),
        (row[:-5], direction[:-5], torch.tensor(0.03)),
    ]
    reference = Engine(model, case.objective, rung="sequential")
    for law, rank, block in (("rademacher", 1, None), ("gaussian", 2, 4)):
        folded = Engine(model, case.objective, rung="fold")
        if block:
            monkeypatch.setattr(folded, "block", lambda batch, block=block: block)
        family = Directions(Key.root(1), dict(folded.params), 4, law, rank)
        for rows, directions, scale in asked:
            with torch.inference_mode():
                one = folded.losses(batch, rows, family, directions, scale)
                other = reference.losses(batch, rows, family, directions, scale)
            torch.testing.assert_close(one, other, rtol=1e-10, atol=0)


@pytest.mark.parametrize("rows", [6, 5, 2, 1])
def test_as_many_tokens_as_rows(rows: int) -> None:
    """Where sizes coincide, only the trace can tell rows from tokens."""
    case, model = CASES["multihead_attention"], built("multihead_attention")
    batch = series(6, length=6).map(
        lambda t: t[:rows].double() if t.is_floating_point() else t[:rows]
    )
    row = torch.arange(6) % rows
    folded, reference = Engine(model, case.objective), Engine(model, case.objective, "sequential")
    family = Directions(Key.root(1), dict(folded.params), 6)
    with torch.inference_mode():
        one = folded.losses(batch, row, family, torch.arange(6), 0.05)
        other = reference.losses(batch, row, family, torch.arange(6), 0.05)
    assert folded.choice is not None and folded.choice.rung == "fold"
    torch.testing.assert_close(one, other, rtol=1e-10, atol=0)


def test_block_size_changes_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    case, model = CASES["bert"], built("bert")
    batch = case.batch(6)
    losses = []
    for rows in (1, 3, 100):
        monkeypatch.setattr(Blocks, "_fitting", lambda *_, rows=rows: rows)
        engine = Engine(model, case.objective)
        family = Directions(Key.root(1), dict(engine.params), 10)
        with torch.inference_mode():
            losses.append(engine.losses(batch, ROW, family, DIRECTION, 0.05))
            assert engine.block(batch) == rows
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-12, atol=0)


def test_batches_of_other_lengths_use_the_same_trace() -> None:
    case, model = CASES["gpt2"], built("gpt2")
    folded, reference = Engine(model, case.objective), Engine(model, case.objective, "sequential")
    family = Directions(Key.root(1), dict(folded.params), 10)
    for length, padded in ((7, True), (10, True), (4, False), (1, False), (6, True)):
        batch = tokens(6, length, padded)
        with torch.inference_mode():
            one = folded.losses(batch, ROW, family, DIRECTION, 0.05)
            other = reference.losses(batch, ROW, family, DIRECTION, 0.05)
        torch.testing.assert_close(one, other, rtol=1e-10, atol=0)
    assert [choice.rung for choice in folded.events] == ["fold"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "bert", "llama"])
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    """Losses move as in float32, to within the rounding of the dtype."""
    case, batch = CASES[name], CASES[name].batch(6).to("cpu", dtype)
    wide, model = built(name, torch.float32), built(name, dtype)
    wide.load_state_dict(model.state_dict())
    scale = torch.full((10,), 0.05, dtype=torch.float64)
    folded, _, _ = both(model, case, batch, "rademacher", 1, scale)
    _, reference, _ = both(wide, case, batch.to("cpu", torch.float32), "rademacher", 1, scale)
    torch.testing.assert_close(folded, reference, rtol=0.02, atol=0.02)


def test_objective_is_called_with_rows_in_order() -> None:
    seen = []

    def objective(output: Tensor, targets: Tensor) -> Tensor:
        seen.append(targets)
        return cross_entropy(output, targets)

    batch = CASES["mlp"].batch(6).to("cpu", torch.float64)
    engine = Engine(built("mlp"), objective)
    with torch.inference_mode():
        engine.losses(batch, ROW)
    torch.testing.assert_close(torch.cat(seen)[-len(ROW) :], batch.targets[ROW])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gain_near_one_moves_in_low_precision(dtype: torch.dtype) -> None:
    """At 1e-3 most bfloat16 gains near one would round back; what rows see must not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.layer_norm(torch.randn(4, 2**16, generator=generator), (2**16,))
    for norm in (nn.LayerNorm(2**16, bias=False), nn.RMSNorm(2**16), _Gain()):
        nn.init.uniform_(norm.weight, 0.8, 1.2, generator=generator)
        model = norm.to(dtype)
        engine = Engine(model, lambda output, targets: output.double().abs().mean(1), rung="fold")
        batch = Batch((x.to(dtype),), torch.zeros(4))
        ones = _Constant(Directions(Key.root(0), dict(engine.params), 1), 1.0)
        row = torch.arange(4)
        with torch.inference_mode():
            clean = engine.losses(batch, row)
            moved = engine.losses(batch, row, ones, torch.zeros(4, dtype=torch.int64), 1e-3)
            # Results are rounded, which averages out over 65,536 of them.
            change = (moved - clean) / (1e-3 * x.double().abs().mean(1))
            torch.testing.assert_close(change, torch.ones_like(change), rtol=0.1, atol=0)


class _Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2**16))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class _Constant(Directions):
    """Directions whose entries are all equal."""

    def __init__(self, family: Directions, value: float) -> None:
        super().__init__(family.key, family.params, family.count, family.law, None)
        object.__setattr__(self, "value", value)

    def at(self, ids: Tensor | slice, together: bool = True) -> _Changed:
        filled = self.value  # type: ignore[attr-defined]
        return _Changed(self, ids, lambda name, value: torch.full_like(value, filled))
