"""LOZO and AIMZO: what is measured is what moves, at every step; and what their means are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.allocator import Plan
from fwdlearn.batch import Batch
from fwdlearn.engine import Engine
from fwdlearn.estimator import Estimator
from fwdlearn.estimators import AIMZO, LOZO, HiZOO
from fwdlearn.keys import Key
from fwdlearn.oracle import ModelOracle
from fwdlearn.testing import Linear, Quadratic, activation_oracle, loss_oracle
from fwdlearn.testing.estimator_case import measured
from fwdlearn.testing.estimator_statistics import z_limit
from fwdlearn.testing.problems import flatten

SHAPES = {"w": (8, 7), "k": (6, 3, 2), "v": (3,), "head": (2, 5)}
ESTIMATORS: list[Estimator] = [
    LOZO(0.01, lazy=2),
    LOZO(0.01, rank=3, lazy=3, mixed=1),
    LOZO(0.01, lazy=2, baseline="antithetic", law="gaussian"),
    AIMZO(0.01, width=2, refresh=2),
    HiZOO(0.01),
]


def whole(grad: Any, params: Any) -> Tensor:
    return flatten({name: grad[name].unsqueeze(0) for name in params})[0]


def steps(estimator: Estimator, count: int, sharing: int = 1) -> list[Any]:
    """(estimate, oracle) of some steps, with the state going from each to the next."""
    problem = Linear.random(Key.root(1), 2, SHAPES)
    found: list[Any] = []
    state = estimator.init(problem.params)
    for step in range(count):
        oracle = activation_oracle(problem)
        plan = Plan(torch.tensor([2, 3]), sharing)
        made, state = estimator.estimate(
            oracle, oracle.params, state, key=Key.root(2).fold(step), plan=plan
        )
        found.append((made, oracle, problem, plan))
    return found


@pytest.mark.parametrize("sharing", [1, 2])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
def test_what_is_measured_is_what_moves_at_every_step(estimator: Estimator, sharing: int) -> None:
    """On a linear loss a slope is known: the estimate is the sum of slope times direction, with
    the very directions that the oracle was asked about. Steps that renew a factor among them."""
    for made, oracle, problem, plan in steps(estimator, 7, sharing):
        gradients = flatten(problem.gradients())
        asked = next(a for a in oracle.asked if a.directions is not None and len(a.row) >= 5)
        z = measured(asked.directions, torch.arange(plan.directions), oracle.params)
        slopes = (gradients[plan.row] * z[plan.direction]).sum(1)
        expected = (plan.weight * slopes) @ z[plan.direction]
        torch.testing.assert_close(whole(made.grad, oracle.params), expected, rtol=1e-6, atol=1e-9)


def bases(estimator: Estimator, count: int) -> list[Tensor]:
    """The space in which the rows of a matrix moved in each step: its projector."""
    found = []
    for _, oracle, _, _ in steps(estimator, count):
        asked = next(a for a in oracle.asked if a.directions is not None)
        rows = asked.directions.dense("w", torch.arange(5)).flatten(0, 1)
        left, sizes, _ = torch.linalg.svd(rows.T, full_matrices=False)
        left = left[:, sizes > 1e-9 * sizes[0]]
        found.append(left @ left.T)
    return found


def test_the_space_of_lozo_stays_and_goes() -> None:
    seen = bases(LOZO(0.01, rank=2, lazy=3), 7)
    assert all(round(float(p.trace())) == 2 for p in seen)
    same = [torch.allclose(one, two) for one, two in zip(seen, seen[1:], strict=False)]
    assert same == [True, True, False, True, True, False]


def test_lozo_over_many_spaces_is_the_gradient() -> None:
    """Each repeat has a space of its own; 2,000 of them, fixed in advance."""
    problem = Linear.random(Key.root(3), 2, {"w": (5, 4), "v": (2,)})
    estimates = []
    for repeat in range(2000):
        oracle, key = loss_oracle(problem), Key.root(4).fold(repeat)
        plan = Plan.uniform(2, 1)
        made, _ = LOZO(0.1).estimate(oracle, oracle.params, None, key=key, plan=plan)
        estimates.append(whole(made.grad, oracle.params))
    sample, exact = torch.stack(estimates), flatten(problem.gradients()).mean(0)
    z = (sample.mean(0) - exact).abs() / (sample.std(0) / len(sample) ** 0.5)
    assert float(z.max()) < z_limit(len(exact), len(sample))


def test_lozo_within_a_space_is_the_projected_gradient() -> None:
    problem = Linear.random(Key.root(3), 1, {"w": (5, 4)})
    oracle, plan = loss_oracle(problem), Plan.uniform(1, 4000)
    made, _ = LOZO(0.1).estimate(oracle, oracle.params, None, key=Key.root(5), plan=plan)
    basis = LOZO(0.1)._bases(Key.root(5).fold("basis"), oracle.params)["w"]
    expected = problem.gradients()["w"][0] @ basis @ basis.T
    apart = (made.grad["w"] - expected).norm() / expected.norm()
    # Of 10 numbers, by 4,000 directions: the error is about the root of 10 / 4,000.
    assert float(apart) < 0.15


class Narrow(nn.Module):
    """Two layers whose inputs lie in a space of three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 8), nn.Linear(8, 3)
        self.table = nn.Embedding(5, 12)

    def forward(self, x: Tensor, word: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x + 0 * self.table(word))))


def narrow() -> tuple[ModelOracle, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, space = Narrow().double(), torch.randn(3, 12).double()
        x = torch.randn(16, 3).double() @ space
    batch = Batch((x, torch.arange(16) % 5), torch.arange(16) % 3)

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, targets, reduction="none")

    return ModelOracle(Engine(model, loss), batch), space


def test_aimzo_finds_where_inputs_lie() -> None:
    """In the space of the inputs nothing is lost, and directions are fewer by as much."""
    oracle, space = narrow()
    estimator, state, plan = AIMZO(1e-4, width=3, refresh=1), None, Plan.uniform(16, 4)
    for step in range(3):
        _, state = estimator.estimate(
            oracle, oracle.params, state, key=Key.root(6).fold(step), plan=plan
        )
    found = state["inputs"]
    # An embedding is no layer with inputs, and a classifier has too few rows.
    assert found.keys() == {"first.weight"}
    basis = found["first.weight"] / found["first.weight"].norm(dim=0)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3).double(), rtol=0, atol=1e-9)
    inside = space.T @ torch.linalg.pinv(space.T)
    torch.testing.assert_close(basis @ basis.T, inside, rtol=0, atol=1e-6)


def test_the_first_step_of_aimzo_knows_no_space_and_later_ones_only_earlier_rows() -> None:
    oracle, _ = narrow()
    plan = Plan.uniform(16, 2)
    made, state = AIMZO(1e-4, width=3).estimate(
        oracle, oracle.params, None, key=Key.root(6), plan=plan
    )
    assert torch.linalg.matrix_rank(made.grad["first.weight"]) == 8
    made, again = AIMZO(1e-4, width=3).estimate(
        oracle, oracle.params, state, key=Key.root(7), plan=plan
    )
    assert torch.linalg.matrix_rank(made.grad["first.weight"]) == 3
    # The next look is ten steps after the first.
    assert again["age"] == 2
    assert torch.equal(again["inputs"]["first.weight"], state["inputs"]["first.weight"])


def test_hizoo_measures_the_curvature_of_each_tensor() -> None:
    """Half of a quadratic's Hessian is diagonal: the mean of a tensor's is found without error."""
    shapes = {"a": (3,), "b": (2, 2)}
    problem = Quadratic.random(Key.root(8), 2, shapes)
    state = HiZOO(0.1, memory=0.0).init(problem.params)
    found: dict[str, list[float]] = {"a": [], "b": []}
    for step in range(400):
        oracle, plan = loss_oracle(problem), Plan.uniform(2, 1)
        made, state = HiZOO(0.1, memory=0.0).estimate(
            oracle, oracle.params, state, key=Key.root(9).fold(step), plan=plan
        )
        # The passes for curvature are counted: one direction, a clean pass, two sides.
        assert made.queries == oracle.queries == 2 * (1 + 1 + 2)
        name = "ab"[step % 2]
        found[name].append(state["curvature"][name])
    exact = _mean_diagonals(problem, shapes)
    for name, values in found.items():
        sample = torch.tensor(values, dtype=torch.float64)
        error = float(sample.std()) / len(sample) ** 0.5 + 1e-9
        assert abs(float(sample.mean()) - exact[name]) < z_limit(1, len(sample)) * error


def _mean_diagonals(problem: Quadratic, shapes: Any) -> dict[str, float]:
    """By second differences along each number, which are exact on a quadratic."""
    found = {}
    rows = torch.arange(problem.rows)
    clean = problem.clean_losses()
    for name in shapes:
        bends = []
        for number in range(problem.params[name].numel()):
            sides = []
            for side in (1.0, -1.0):
                values = {n: v.repeat(len(rows), *[1] * v.dim()) for n, v in problem.params.items()}
                values[name].flatten(1)[:, number] += side
                sides.append(problem.losses(values, rows))
            bends.append(float((sides[0] - 2 * clean + sides[1]).mean()))
        found[name] = sum(bends) / len(bends)
    return found


def test_hizoo_moves_less_where_the_loss_is_curved() -> None:
    params = {"flat": torch.zeros(4, dtype=torch.float64), "bent": torch.zeros(4).double()}
    state = {"curvature": {"flat": 0.1, "bent": -2.5}, "looks": {"flat": 3, "bent": 3}}
    sizes = HiZOO(limit=100.0)._sizes(state["curvature"], params)
    assert sizes["flat"] == pytest.approx(5**0.5) and sizes["bent"] == pytest.approx(5**-0.5)
    assert HiZOO(limit=2.0)._sizes(state["curvature"], params)["flat"] == pytest.approx(2**0.5)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LOZO(sigma=0), "LOZO(sigma=...) must be positive, got 0."),
        (lambda: LOZO(rank=0), "LOZO(rank=...) must be a positive integer"),
        (lambda: LOZO(lazy=0), "LOZO(lazy=...) must be at least 1, got 0."),
        (lambda: LOZO(baseline="mean"), "LOZO(baseline=...) must be 'clean' or 'antithetic'"),  # type: ignore[arg-type]
        (lambda: AIMZO(width=0), "AIMZO(width=...) must be at least 1, got 0."),
        (lambda: AIMZO(memory=1.0), "AIMZO(memory=...) must be in [0, 1), got 1.0."),
        (lambda: HiZOO(limit=0.5), "HiZOO(limit=...) must be at least 1, got 0.5."),
        (lambda: HiZOO(probes=0), "HiZOO(probes=...) must be at least 1, got 0."),
    ],
)
def test_settings_out_of_range(make: Any, text: str) -> None:
    with pytest.raises(ValueError) as raised:
        make()
    assert text in str(raised.value)
