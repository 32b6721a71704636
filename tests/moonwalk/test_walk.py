"""Whole gradients against autograd: every way to walk, the monitor and what follows from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwdlearn.batch import Batch
from fwdlearn.errors import BackwardError, UsageError
from fwdlearn.models.built import weights_from
from fwdlearn.moonwalk import (
    CausalConv1d,
    Chain,
    ChainOracle,
    Conv2d,
    Coupling,
    Dense,
    GradientOracle,
    Layer,
    LeakyReLU,
    MaxPool2d,
    MeanPool2d,
    Moonwalk,
    Orthogonal,
    Patches2d,
    Permutation,
    ReLU,
    Reshape,
    Tanh,
    Walk,
    cnn,
    mlp,
    output_cotangent,
)
from fwdlearn.objectives import cross_entropy, mean_squared_error
from fwdlearn.oracle import LossOracle, forbid_backward

ROWS = 8


def rows(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs and classes."""
    with weights_from(7):
        return torch.randn(ROWS, *shape, dtype=torch.float64).to(dtype), torch.randint(3, (ROWS,))


def walked(chain: Chain, x: Tensor, targets: Tensor, **settings: Any) -> Walk:
    return Moonwalk(**settings).walk(chain, x, lambda y: cross_entropy(y, targets))


def error(chain: Chain, x: Tensor, targets: Tensor, walk: Walk) -> float:
    """The largest relative error among the parameters."""
    with forbid_backward():
        found = dict(walk)
    named = dict(chain.named_parameters())
    assert set(found) == set(named)
    loss = cross_entropy(chain(x), targets).mean()
    exact = torch.autograd.grad(loss, list(named.values()))
    assert all(found[name].shape == value.shape for name, value in named.items())
    pairs = zip(named, exact, strict=True)
    return max(float((found[name] - g).norm() / g.norm()) for name, g in pairs)


def tower(*layers: Layer) -> Chain:
    return Chain([*layers])


def images() -> Chain:
    """Everything that works on images, widening and narrowing."""
    return tower(
        Patches2d(2, 12, 2),
        LeakyReLU(0.5),
        Patches2d(12, 8, 1),
        Permutation([7, 6, 5, 4, 3, 2, 1, 0]),
        Coupling(
            Chain([Conv2d(4, 6), LeakyReLU(), Conv2d(6, 4)]), Chain([Conv2d(4, 4), LeakyReLU()])
        ),
        MaxPool2d(2),
        Conv2d(8, 6),
        MeanPool2d(2),
        Reshape((6, 1, 1), (6,)),
        Dense(6, 3),
    )


def sequences() -> Chain:
    return tower(
        CausalConv1d(4, 4, 3),
        LeakyReLU(0.5),
        CausalConv1d(4, 6, 4, stride=2),
        LeakyReLU(0.5),
        CausalConv1d(6, 8, 2),
        Reshape((8, 6), (48,)),
        Dense(48, 3),
    )


CHAINS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "submersive": (
        lambda: tower(
            Dense(12, 9),
            LeakyReLU(),
            Orthogonal(9),
            LeakyReLU(),
            Dense(9, 5),
            LeakyReLU(),
            Dense(5, 3),
        ),
        (12,),
    ),
    "fragmental": (
        lambda: tower(Dense(6, 9), ReLU(), Dense(9, 12), LeakyReLU(), Dense(12, 4), Dense(4, 3)),
        (6,),
    ),
    "images": (images, (2, 8, 8)),
    "sequences": (sequences, (4, 12)),
    "mlp": (lambda: mlp(8, 8, 5, 3), (8,)),
    "mlp orthogonal": (lambda: mlp(6, 8, 4, 3, orthogonal=True), (6,)),
    "cnn": (lambda: cnn((2, 8, 8), (8, 16), 2, 3), (2, 8, 8)),
}


def chain_of(name: str) -> tuple[Chain, Tensor, Tensor]:
    make, shape = CHAINS[name]
    with weights_from(3):
        return make().double(), *rows(*shape)


@pytest.mark.parametrize("anchors", [None, 1, 2, (3, 1)], ids=str)
@pytest.mark.parametrize("name", list(CHAINS))
def test_gradients_equal_autograd(name: str, anchors: Any) -> None:
    chain, x, targets = chain_of(name)
    walk = walked(chain, x, targets, anchors=anchors)
    assert error(chain, x, targets, walk) < 1e-10
    assert walk.retried == 0 and walk.drift < 1e-11
    assert walk.losses is not None
    torch.testing.assert_close(walk.losses, cross_entropy(chain(x), targets).detach())


@pytest.mark.parametrize("first", ["inversion", "tangents"])
@pytest.mark.parametrize("name", ["fragmental", "mlp", "images"])
def test_first_phases_agree(name: str, first: str) -> None:
    chain, x, targets = chain_of(name)
    if name == "images":
        # What is before these layers is large, and carrying its tangents slow.
        chain, x = Chain([layer for _, layer in chain.parts[4:]]), rows(8, 4, 4)[0]
    for anchors in (None, 2):
        walk = walked(chain, x, targets, anchors=anchors, first=first)
        assert error(chain, x, targets, walk) < 1e-10 and walk.retried == 0


@pytest.mark.parametrize(("slope", "dtype"), [(0.2, None), (0.5, None), (0.2, torch.float64)])
def test_float32_at_64_layers(slope: float, dtype: torch.dtype | None) -> None:
    chain = mlp(32, 32, 64, 3, slope=slope)
    x, targets = rows(32, dtype=torch.float32)
    anchors = 4 if dtype is None else 16
    walk = walked(chain, x, targets, anchors=anchors, dtype=dtype)
    assert error(chain, x, targets, walk) < 1e-4
    assert walk.retried == 0


def test_float64_at_64_layers() -> None:
    chain = mlp(32, 32, 64, 3).double()
    x, targets = rows(32)
    assert error(chain, x, targets, walked(chain, x, targets, anchors=4)) < 1e-10


def ill_conditioned(cutoff: float = 0.0) -> Chain:
    """Sixteen layers with Gaussian weights, of condition about a hundred each."""
    with weights_from(5):
        layers: list[Layer] = []
        for _ in range(16):
            layers += [Dense(24, 24, cutoff=cutoff), LeakyReLU(0.5)]
            nn.init.normal_(layers[-2].weight, std=24**-0.5)  # type: ignore[arg-type]
        return Chain([*layers, Dense(24, 3)])


def test_the_monitor_sees_what_goes_wrong_and_the_walk_recovers() -> None:
    chain, (x, targets) = ill_conditioned(), rows(24, dtype=torch.float32)
    blind = walked(chain, x, targets, anchors=8, tolerance=float("inf"))
    assert error(chain, x, targets, blind) > 1
    assert blind.drift > 1 and blind.retried == 0
    walk = walked(chain, x, targets, anchors=8)
    assert error(chain, x, targets, walk) < 1e-4
    assert walk.retried >= 2 and walk.drift < 3e-5
    assert walk.evaluations > blind.evaluations


def test_weak_directions_as_fragments_need_no_second_walk() -> None:
    chain, (x, targets) = ill_conditioned(cutoff=0.3), rows(24, dtype=torch.float32)
    walk = walked(chain, x, targets, anchors=8)
    assert error(chain, x, targets, walk) < 1e-4
    assert walk.retried == 0


def test_a_singular_layer_is_walked_around() -> None:
    chain, x, targets = chain_of("mlp")
    with torch.no_grad():
        weight = chain.parts[4][1].weight
        assert isinstance(weight, Tensor)
        weight[0] = 0
    walk = walked(chain, x, targets, anchors=None)
    assert error(chain, x, targets, walk) < 1e-10
    assert walk.retried > 0


def test_saturated_units_are_walked_around() -> None:
    """Where tanh is flat its inverse is infinite, and not a number must count as a miss."""
    with weights_from(1):
        chain = tower(Dense(6, 6, gain=400.0), Tanh(), Dense(6, 6), LeakyReLU(), Dense(6, 3))
    chain, (x, targets) = chain.double(), rows(6)
    walk = walked(chain, x, targets, anchors=None)
    with forbid_backward():
        found = dict(walk)
    assert walk.retried > 0
    exact = torch.autograd.grad(
        cross_entropy(chain(x), targets).mean(), list(chain.parameters()), allow_unused=True
    )
    for (name, _), value in zip(chain.named_parameters(), exact, strict=True):
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


def test_gradients_are_final_when_they_come() -> None:
    """Updating each parameter at once gives the same as updating all at the end."""
    results = []
    for eager in (True, False):
        chain, x, targets = chain_of("cnn")
        named = dict(chain.named_parameters())
        walk = walked(chain, x, targets, anchors=2)
        for name, gradient in walk if eager else list(walk):
            named[name].data -= 0.1 * gradient
        results.append([parameter.detach() for parameter in named.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_training_follows_autograd() -> None:
    curves = []
    x, targets = rows(8)
    for automatic in (True, False):
        chain, losses = mlp(8, 8, 6, 3).double(), []
        optimizer = torch.optim.SGD(chain.parameters(), 0.1, momentum=0.9)
        for _ in range(20):
            if automatic:
                optimizer.zero_grad()
                loss = cross_entropy(chain(x), targets).mean()
                loss.backward()
            else:
                with forbid_backward():
                    walk = walked(chain, x, targets, anchors=3)
                    for name, gradient in walk:
                        chain.get_parameter(name).grad = gradient
                    assert walk.losses is not None
                    loss = walk.losses.mean()
            optimizer.step()
            losses.append(float(loss.detach()))
        curves.append(losses)
    assert curves[0][-1] < curves[0][0] / 2
    assert curves[0] == pytest.approx(curves[1], rel=1e-8)


def test_frozen_parameters_are_left_out() -> None:
    chain, x, targets = chain_of("mlp")
    frozen = chain.parts[2][1]
    frozen.requires_grad_(False)
    found = dict(walked(chain, x, targets, anchors=1))
    trained = [name for name, p in chain.named_parameters() if p.requires_grad]
    assert list(found) == trained and len(trained) == 10
    loss = cross_entropy(chain(x), targets).mean()
    exact = torch.autograd.grad(loss, [chain.get_parameter(name) for name in trained])
    for name, value in zip(trained, exact, strict=True):
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    chain.requires_grad_(False)
    assert list(walked(chain, x, targets)) == []


def test_rows_can_be_weighted() -> None:
    chain, x, targets = chain_of("mlp")
    weight = torch.linspace(0, 1, ROWS, dtype=torch.float64)
    walk = Moonwalk().walk(chain, x, lambda y: cross_entropy(y, targets), weight)
    found = dict(walk)
    loss = (weight * cross_entropy(chain(x), targets)).sum()
    for name, parameter in chain.named_parameters():
        value = torch.autograd.grad(loss, parameter, retain_graph=True)[0]
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("objective", [cross_entropy, mean_squared_error, F.mse_loss])
def test_cotangents_of_outputs_by_forward_mode(objective: Any) -> None:
    """`F.mse_loss` stands for any function of rows; here it gets one that sums by itself."""
    with weights_from(1):
        output = torch.randn(5, 40, dtype=torch.float64)
        targets = torch.randint(40, (5,)) if objective is cross_entropy else torch.randn(5, 40)
        # Before torch 2.12, the derivative of `F.mse_loss` wants operands of one dtype.
        targets = targets.double() if objective is F.mse_loss else targets
    weight = torch.linspace(0, 2, 5, dtype=torch.float64)

    def losses(y: Tensor) -> Tensor:
        if objective is F.mse_loss:
            return objective(y, targets, reduction="none").mean(1)
        return objective(y, targets)

    with forbid_backward():
        values, h = output_cotangent(losses, output, weight)
    asked = output.clone().requires_grad_()
    torch.testing.assert_close(values, losses(output))
    expected = torch.autograd.grad((weight * losses(asked)).sum(), asked)[0]
    torch.testing.assert_close(h, expected, rtol=1e-10, atol=1e-12)


class Cheating(LeakyReLU):
    """Backpropagates through something of its own."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            torch.ones(1, requires_grad=True).sum().backward()
        return super().forward(x)


def test_the_oracle_answers_forbids_and_counts() -> None:
    chain, x, targets = chain_of("mlp")
    oracle = ChainOracle(chain, Batch((x,), targets), cross_entropy, Moonwalk(anchors=2))
    assert isinstance(oracle, GradientOracle) and not isinstance(oracle, LossOracle)
    assert oracle.rows == ROWS and oracle.queries == 0
    weight = torch.full((ROWS,), 1 / ROWS, dtype=torch.float64)
    losses, found = oracle.gradients(weight)
    assert losses.shape == (ROWS,) and set(found) == set(oracle.params)
    # One forward pass in each phase.
    assert oracle.queries == 2 * ROWS

    cheating = Chain([Dense(8, 3), Cheating()]).double()
    with pytest.raises(BackwardError, match="a backward pass was asked for"):
        ChainOracle(cheating, Batch((x,), targets), cross_entropy).gradients(weight)
    with pytest.raises(UsageError, match="needs batches of one input, got 2 and 0 by name"):
        ChainOracle(chain, Batch((x, x), targets), cross_entropy)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Moonwalk(anchors=0), r"Moonwalk\(anchors=...\) must be at least 1, .* got 0"),
        (lambda: Moonwalk(anchors=(4, 8)), r"several numbers falling, got \(4, 8\)"),
        (lambda: Moonwalk(anchors=()), r"got \(\)"),
        (lambda: Moonwalk(tolerance=0.0), r"Moonwalk\(tolerance=...\) must be positive, got 0.0"),
        (lambda: Moonwalk(first="x"), r"one of residuals, inversion, tangents, got 'x'"),
        (lambda: Chain([nn.Linear(2, 2)]), "needs layers of fwdlearn.moonwalk, got Linear at pl"),
        (lambda: Chain([LeakyReLU()] * 2), "a layer or a parameter twice, again at place 1"),
        (lambda: mlp(2, 2, 0, 2), r"mlp\(depth=...\) must be at least 1, got 0"),
        (lambda: cnn((1, 4, 4), (3,), 1, 2), r"cnn\(channels=...\) must be even, got \[3\]"),
    ],
)
def test_settings_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()
