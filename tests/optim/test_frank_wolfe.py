"""FrankWolfe: its formulas, its guarantees, its state, what it refuses."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fwdlearn.errors import NonFiniteError, UsageError
from fwdlearn.forecast import optimizer_bytes
from fwdlearn.optim import FrankWolfe
from fwdlearn.optim.sets import (
    Box,
    ConstraintSet,
    KSparsePolytope,
    L1Ball,
    L2Ball,
    LInfBall,
    LpBall,
    NuclearBall,
    Product,
    Simplex,
    SpectralBall,
)
from tests.optim.test_sets import SETS, each_set, normal


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(normal(*shape, seed=seed, dtype=dtype))


def excess(region: Any, point: Tensor) -> float:
    return float(region.excess(point.detach().double()))


@pytest.mark.parametrize("averaging", ["dimension", "classical", 0.3, None], ids=str)
def test_the_update_is_that_of_the_papers(averaging: Any) -> None:
    region, tangents = L2Ball(2.0), 3
    weight = nn.Parameter(torch.zeros(5, 2, dtype=torch.float64))
    optimizer = FrankWolfe([weight], set=region, averaging=averaging, tangents=tangents)
    average = torch.zeros(5, 2, dtype=torch.float64)
    point, seen = average.clone(), 1.0
    for k in range(30):
        gradient = normal(5, 2, seed=k)
        rho = {
            "dimension": min(1.0, 4 / ((1 + 10 / tangents) ** (1 / 3) * (k + 8) ** (2 / 3))),
            "classical": min(1.0, 4 / (k + 8) ** (2 / 3)),
            0.3: 0.3,
            None: 1.0,
        }[averaging]
        average = (1 - rho) * average + rho * gradient
        seen *= 1 - rho
        vertex = -2.0 * average / average.norm()
        gap = float((average * (point - vertex)).sum()) / (1 - seen)
        point = point + 2 / (k + 8) * (vertex - point)
        weight.grad = gradient
        optimizer.step()
        assert torch.allclose(weight, point, rtol=1e-12, atol=1e-12)
        assert optimizer.gap == pytest.approx(gap)
    assert ("average" in optimizer.state[weight]) == (averaging is not None)


def test_the_weight_falls_with_the_dimension_of_all_parameters() -> None:
    weights = [parameter(4, 5), parameter(7)]
    for given, d in ((None, 27), (1000, 1000)):
        optimizer = FrankWolfe(weights, set=L2Ball(1.0), tangents=2, dimension=given)
        weights[1].grad = torch.ones(7)
        optimizer.step()
        rho = 4 / ((1 + d / 2) ** (1 / 3) * 8 ** (2 / 3))
        average = optimizer.state[weights[1]]["average"]
        assert torch.allclose(average, torch.full((7,), rho))


@each_set
def test_exact_gradients_keep_the_known_bound(region: Any) -> None:
    """f - f* <= 2 L diameter^2 / (k + 2) for gamma = 2 / (k + 2) (Jaggi 2013), here with L = 1."""
    for scale in (0.1, 3.0):
        centre = normal(4, 3, seed=7) * scale * getattr(region, "radius", 1.0)
        best = region.project(centre)
        least = float((best - centre).square().sum()) / 2
        if isinstance(region, LpBall):
            least = 0.0 if region.contains(centre, 0.0) else -math.inf
        weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
        optimizer = FrankWolfe([weight], set=region, averaging=None, delay=2.0)
        diameter = region.diameter(weight.shape)
        lowest = math.inf
        for k in range(150):
            value = float((weight - centre).square().sum().detach()) / 2
            weight.grad = (weight - centre).detach()
            true = optimizer.true_gap()
            optimizer.step()
            assert optimizer.gap == true
            assert value - least <= true + 1e-9 or least == -math.inf
            lowest = min(lowest, true)
            # After k steps; the start itself may be as far as the diameter allows.
            if k and least > -math.inf:
                assert value - least <= 2 * diameter**2 / (k + 2) + 1e-9
        # Jaggi 2013, theorem 2: some gap is as small, with a factor of 27/4 and exact oracles.
        assert lowest <= 27 / 4 * diameter**2 / (150 + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_set
def test_every_iterate_is_inside(region: Any, dtype: torch.dtype) -> None:
    """Random steps along a face of the set, where nothing but rounding decides, and off it.

    Positive semidefinite gradients of one sign keep the iterates of most sets on a single face.
    Without the guard L1Ball, KSparsePolytope, SpectralBall and Simplex fail in float32.
    """
    weight = parameter(6, 6, dtype=dtype)
    weight.data *= 100
    optimizer = FrankWolfe([weight], set=region, averaging=None, step_size=0.05)
    worst = excess(region, weight)
    for k in range(1000 if dtype == torch.float32 else 200):
        root = normal(6, 6, seed=0 if k % 100 >= 50 else k, dtype=dtype).abs()
        weight.grad = -root @ root.T if k % 200 < 150 else normal(6, 6, seed=k, dtype=dtype)
        optimizer.step()
        now = excess(region, weight)
        worst = max(worst, now)
        assert now <= optimizer.state[weight]["excess"] + 2e-7
    # An equality holds to rounding; inequalities hold, but for the rounding of `excess` itself.
    assert worst <= (2e-7 if isinstance(region, Simplex) else 1e-14)


@pytest.mark.parametrize("size", [100.0, 1e-3])
@each_set
def test_weights_start_inside(region: Any, size: float) -> None:
    weight = parameter(6, 4)
    weight.data *= size
    before = weight.detach().clone()
    FrankWolfe([weight], set=region)
    assert excess(region, weight) <= 1e-6
    if region.contains(before, 0.0):
        assert torch.equal(weight, before)


@pytest.mark.parametrize("averaging", ["dimension", None], ids=str)
@each_set
def test_a_saved_state_continues_bit_for_bit(region: Any, averaging: Any) -> None:
    def steps(weight: nn.Parameter, optimizer: FrankWolfe, start: int) -> None:
        for k in range(start, start + 30):
            weight.grad = normal(6, 4, seed=k, dtype=torch.float32)
            optimizer.step()

    weight = parameter(6, 4)
    optimizer = FrankWolfe([weight], set=region, averaging=averaging)
    steps(weight, optimizer, 0)
    file = io.BytesIO()
    torch.save({"weight": weight.data, "optimizer": optimizer.state_dict()}, file)
    steps(weight, optimizer, 30)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = nn.Parameter(saved["weight"])
    second = FrankWolfe([again], set=region, averaging=averaging)
    second.load_state_dict(saved["optimizer"])
    steps(again, second, 30)
    assert torch.equal(again, weight)
    assert second.gap == optimizer.gap
    first, last = optimizer.state[weight], second.state[again]
    assert first.keys() == last.keys()
    for key, value in first.items():
        assert torch.equal(value, last[key]) if isinstance(value, Tensor) else value == last[key]


def test_a_state_of_another_set_is_refused() -> None:
    weight = parameter(3)
    saved = FrankWolfe([weight], set=L1Ball(30.0)).state_dict()
    with pytest.raises(UsageError) as caught:
        FrankWolfe([weight], set=L1Ball(10.0)).load_state_dict(saved)
    assert str(caught.value) == (
        "FrankWolfe: the state was saved with L1Ball(radius=30.0) and the optimizer has "
        "L1Ball(radius=10.0), which may not hold its weights; make it with the saved set."
    )


def test_tensors_can_be_streamed() -> None:
    regions = [L1Ball(2.0), L2Ball(3.0), NuclearBall(1.5), Box(-1.0, 1.0)]

    def made() -> tuple[list[nn.Parameter], FrankWolfe]:
        weights = [parameter(5, 4, seed=i) for i in range(4)]
        groups = [{"params": [w], "set": s} for w, s in zip(weights, regions, strict=True)]
        return weights, FrankWolfe(groups, set=LInfBall(1.0))

    together, at_once = made()
    streamed, one_by_one = made()
    for k in range(10):
        for i, (a, b) in enumerate(zip(together, streamed, strict=True)):
            gradient = normal(5, 4, seed=10 * k + i, dtype=torch.float32)
            a.grad = gradient
            b.grad = gradient
            one_by_one.step()
            b.grad = None
        at_once.step()
    for a, b, region in zip(together, streamed, regions, strict=True):
        assert torch.equal(a, b)
        assert region.contains(a.detach())
        assert at_once.state[a]["step"] == one_by_one.state[b]["step"] == 10
    assert at_once.gap == one_by_one.gap


def test_parameters_without_a_gradient_stay() -> None:
    moved, still = parameter(3), parameter(3)
    optimizer = FrankWolfe([moved, still], set=L2Ball(100.0))
    before = still.detach().clone()
    assert math.isnan(optimizer.gap)
    moved.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(still, before)
    assert still not in optimizer.state and optimizer.state[moved]["step"] == 1
    assert optimizer.gap == optimizer.state[moved]["gap"]


def test_product_of_sets() -> None:
    weights = [parameter(3), parameter(2, 2)]
    optimizer = FrankWolfe(weights, set=Product((L1Ball(1.0), NuclearBall(0.5))))
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    for _ in range(20):
        optimizer.step()
    assert L1Ball(1.0).contains(weights[0].detach())
    assert NuclearBall(0.5).contains(weights[1].detach())
    with pytest.raises(UsageError, match="a Product of 1 sets, and its group has 2 parameters"):
        FrankWolfe(weights, set=Product((L1Ball(1.0),)))


def test_schedules_change_the_step() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = FrankWolfe([weight], set=LInfBall(1.0), step_size=0.5)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    seen = []
    for _ in range(3):
        weight.data.zero_()
        weight.grad = -torch.ones(2)
        optimizer.step()
        schedule.step()
        seen.append(float(weight.data[0]))
    assert seen == [0.5, 0.25, 0.125]
    weight.data.zero_()
    optimizer.param_groups[0]["lr"] = 100.0
    optimizer.step()
    assert float(weight.data[0]) == pytest.approx(1.0, rel=1e-5)


@each_set
def test_layouts_other_than_contiguous(region: Any) -> None:
    usual = parameter(6, 4)
    turned = nn.Parameter(usual.detach().clone().T.contiguous().T)
    assert not turned.is_contiguous()
    optimizers = [FrankWolfe([w], set=region) for w in (usual, turned)]
    for k in range(5):
        gradient = normal(6, 4, seed=k, dtype=torch.float32)
        usual.grad, turned.grad = gradient, gradient.T.contiguous().T
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(usual, turned, atol=1e-6)


class Allocations(TorchDispatchMode):
    """Keeps the size of the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for each in made if isinstance(made, tuple) else (made,):
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, each.numel())
        return made


@pytest.mark.parametrize(
    "region",
    [L1Ball(1.0), L2Ball(1.0), KSparsePolytope(1.0, 5), NuclearBall(1.0, 4), Simplex()],
    ids=repr,
)
def test_thin_steps_need_no_dense_temporary(region: ConstraintSet) -> None:
    weight = nn.Parameter(torch.zeros(60, 50))
    optimizer = FrankWolfe([weight], set=region)
    weight.grad = normal(60, 50, dtype=torch.float32)
    optimizer.step()
    with Allocations() as seen:
        optimizer.step()
    assert 0 < seen.largest < weight.numel() / 2


def test_memory_is_one_tensor_or_none() -> None:
    weight = parameter(6, 4)
    assert optimizer_bytes(FrankWolfe([weight], set=L1Ball(1.0))) == 6 * 4 * 4
    assert optimizer_bytes(FrankWolfe([weight], set=L1Ball(1.0), averaging=None)) == 0


def test_averaging_repairs_what_one_tangent_cannot() -> None:
    """Noise that is as large as the gradient is small: the plain method stalls, this one does not.

    A quadratic in 50 dimensions on the l1 ball, one Rademacher tangent a step. Twenty other seeds
    left at most 0.008 and at least 2.05 of the start.
    """
    centre = torch.zeros(50, dtype=torch.float64)
    centre[:3] = torch.tensor([2.0, -1.0, 0.5])
    region = L1Ball(5.0)
    start = float(centre.square().sum()) / 2
    for seed in range(3):
        left = {}
        for averaging in ("dimension", None):
            weight = nn.Parameter(torch.zeros(50, dtype=torch.float64))
            optimizer = FrankWolfe([weight], set=region, averaging=averaging)
            generator = torch.Generator().manual_seed(seed)
            for _ in range(1000):
                tangent = torch.randint(0, 2, (50,), generator=generator).double() * 2 - 1
                slope = tangent @ (weight.detach() - centre)
                weight.grad = slope * tangent
                optimizer.step()
            left[averaging] = float((weight.detach() - centre).square().sum()) / 2 / start
        assert left["dimension"] < 0.05
        assert left[None] > 1


@dataclass(frozen=True)
class Coupled(L2Ball):
    """A ball around all tensors of a group together."""

    couples = True


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"set": "L1Ball"}, "FrankWolfe(set=...) must be a constraint set of fwdlearn.optim.sets,"),
        (
            {"set": Coupled(1.0)},
            "FrankWolfe(set=...) cannot be Coupled: it couples tensors, and tensors are updated "
            "one at a time; give each its own set (parameter groups or Product), or hold the "
            "weights in one tensor.",
        ),
        ({"lr": 0.0}, "FrankWolfe(lr=...) must be positive, got 0.0."),
        (
            {"averaging": "momentum"},
            "FrankWolfe(averaging=...) must be 'dimension', 'classical', a constant in (0, 1] or "
            "None, got 'momentum'.",
        ),
        ({"averaging": 0.0}, "FrankWolfe(averaging=...) must be 'dimension', "),
        ({"step_size": 1.5}, "FrankWolfe(step_size=...) must be in (0, 1], or None for 2 / (k + "),
        ({"delay": 1.0}, "FrankWolfe(delay=...) must be at least 2, got 1.0."),
        ({"tangents": 0}, "FrankWolfe(tangents=...) must be at least 1, got 0."),
        ({"dimension": 0}, "FrankWolfe(dimension=...) must be at least 1, got 0."),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    for where in ("defaults", "group"):
        with pytest.raises(ValueError) as caught:
            if where == "defaults":
                FrankWolfe([parameter(2)], **{"set": L1Ball(1.0), **settings})
            else:
                FrankWolfe([{"params": [parameter(2)], **settings}], set=L1Ball(1.0))
        assert str(caught.value).startswith(message)


def test_low_precision_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    with pytest.raises(UsageError, match="float32 or float64, got torch.bfloat16.*model.float()"):
        FrankWolfe([weight], set=L1Ball(1.0))


@pytest.mark.parametrize("region", [s for s in SETS if type(s) is not SpectralBall], ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_refused(region: Any, bad: float) -> None:
    weight = parameter(2, 2)
    optimizer = FrankWolfe([weight], set=region)
    weight.grad = torch.full((2, 2), bad)
    before = weight.detach().clone()
    with pytest.raises(NonFiniteError, match=r"shape \(2, 2\) is not finite"):
        optimizer.step()
    assert torch.equal(weight, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@each_set
def test_a_gpu_takes_the_same_steps(region: Any) -> None:
    weights = [parameter(6, 4), nn.Parameter(normal(6, 4, dtype=torch.float32).cuda())]
    optimizers = [FrankWolfe([w], set=region) for w in weights]
    for k in range(20):
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = normal(6, 4, seed=k, dtype=torch.float32).to(weight.device)
            optimizer.step()
    assert torch.allclose(weights[0], weights[1].cpu(), atol=1e-4)
