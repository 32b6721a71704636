"""Noise of layer outputs: what it is, that it stays what it is, and how it is summed."""

from __future__ import annotations

import math

import pytest
import torch

from fwdlearn import noise as module
from fwdlearn.errors import UsageError
from fwdlearn.keys import Key
from fwdlearn.noise import LAWS, GivenNoise, NoiseSum, Output, SiteNoise

SITES = {
    "first": Output((7, 12), torch.float32, ("first",)),
    "second": Output((300,), torch.float64, ("second",)),
    "head": Output((3, 2, 2), torch.bfloat16, ("head",)),
}
IDS = torch.tensor([4, 0, 4, 2])


def noise(law: str = "rademacher", **settings: object) -> SiteNoise:
    return SiteNoise(Key.root(3), SITES, 5, law, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("law", list(LAWS))
@pytest.mark.parametrize("name", list(SITES))
def test_added_is_what_is_written_out(law: str, name: str) -> None:
    """The fast way through packed bits and the numbers written out agree."""
    some = noise(law, scales={name: 0.5})
    out = torch.randn(4, *SITES[name].shape, dtype=SITES[name].dtype)
    scale = torch.tensor([0.1, -2.0, 0.0, 1e-3], dtype=torch.float64)
    dense = some.dense(name, IDS)
    assert dense.dtype == torch.promote_types(out.dtype, torch.float32)
    step = scale.view(-1, *[1] * (out.dim() - 1)).to(dense.dtype) * dense
    expected = (out.to(dense.dtype) + step).to(out.dtype)
    # Also through a view of other strides.
    for view in (out.clone(), out.clone().movedim(0, -1).contiguous().movedim(-1, 0)):
        some.add(view, name, IDS, scale)
        tolerance = {torch.bfloat16: 2e-2, torch.float32: 1e-6, torch.float64: 1e-15}[out.dtype]
        torch.testing.assert_close(view, expected, rtol=tolerance, atol=tolerance)
    if law == "rademacher":
        assert (dense.abs() == 0.5).all()


@pytest.mark.parametrize("law", list(LAWS))
def test_a_number_depends_on_key_name_and_its_own_number_alone(
    law: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = noise(law).dense("second", IDS)
    assert torch.equal(few[0], few[2])
    assert torch.equal(few, noise(law).dense("second", torch.arange(5))[IDS])
    more = SiteNoise(Key.root(3), {**SITES, "a": Output((9,), torch.float32, ())}, 1000, law)
    assert torch.equal(few, more.dense("second", IDS))
    assert torch.equal(few, noise(law, only=("second",)).dense("second", IDS))
    monkeypatch.setattr(module, "_KEEP_BYTES", 0)
    monkeypatch.setattr(module, "_WORDS", 1)
    monkeypatch.setattr(module, "_NUMBERS", {"cpu": 1})
    assert torch.equal(few, noise(law).dense("second", IDS))
    out = torch.zeros(4, 300, dtype=torch.float64)
    noise(law).add(out, "second", IDS, torch.ones(4, dtype=torch.float64))
    assert torch.equal(few, out)
    other = SiteNoise(Key.root(4), SITES, 5, law).dense("second", IDS)
    assert not torch.equal(few, other)


def test_layers_of_one_shape_and_parameters_of_one_name_share_no_bits() -> None:
    from fwdlearn.directions import Directions

    shape = (16, 16)
    sites = {name: Output(shape, torch.float32, (name,)) for name in ("a", "b")}
    ids = torch.arange(2)
    some = SiteNoise(Key.root(0), sites, 2)
    family = Directions(Key.root(0), {"a": torch.zeros(shape)}, 2, rank=None)
    tensors = [some.dense("a", ids), some.dense("b", ids), family.dense("a", ids)]
    for one in range(3):
        for other in range(one):
            # 512 signs: six standard deviations of the sum of their products.
            assert (tensors[one] * tensors[other]).sum().abs() < 6 * math.sqrt(512)


@pytest.mark.parametrize("law", list(LAWS))
def test_moments_and_scores(law: str) -> None:
    """Mean 0, variance 1 and E[z score] = 1 over 10^5 numbers, at five standard errors."""
    sites = {"a": Output((10**5,), torch.float64, ())}
    some = SiteNoise(Key.root(8), sites, 1, law)
    ids, one = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.float64)
    z, score = some.times("a", ids, one)[0], some.times("a", ids, one, score=True)[0]
    for values, mean in ((z, 0.0), (z.square(), 1.0), (score, 0.0), (z * score, 1.0)):
        error = float(values.std()) / math.sqrt(len(values)) + 1e-12
        assert abs(float(values.mean()) - mean) < 5 * error
    if law == "laplace":
        torch.testing.assert_close(score.abs(), torch.full_like(score, math.sqrt(2)))
    else:
        assert torch.equal(z, score)


def test_words_are_those_of_the_key() -> None:
    """Bit k of the stream of a layer, counted from the least significant, is its number k."""
    from fwdlearn.keys import stream_id

    low, high = (torch.tensor(word) for word in stream_id("output of second"))
    words = Key.root(3).words(torch.arange(3), torch.tensor(4), (low, high)).flatten()
    bits = (words.unsqueeze(1) >> torch.arange(32)) & 1
    assert torch.equal(noise().dense("second", IDS)[0], (2 * bits - 1).flatten()[:300].double())


@pytest.mark.parametrize("law", list(LAWS))
@pytest.mark.parametrize("step", [1, 100, 2**19])
def test_sums_over_queries(law: str, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unequal counts, rows in any order, a row without queries."""
    monkeypatch.setattr(module, "_NUMBERS", {"cpu": step})
    some = noise(law, scales={"first": 0.25})
    row, index = torch.tensor([3, 0, 0, 3, 1, 3]), torch.tensor([0, 1, 2, 3, 4, 1])
    coefficients = torch.linspace(-1, 1, 6, dtype=torch.float64)
    total = NoiseSum(some, row, index, coefficients, rows=5)
    assert list(total) == list(SITES) and len(total) == 3
    for name in SITES:
        dtype = torch.promote_types(SITES[name].dtype, torch.float32)
        scores = some.times(name, index, torch.ones(6, dtype=dtype), score=True)
        expected = torch.zeros(5, *SITES[name].shape, dtype=dtype)
        for j in range(6):
            expected[row[j]] += coefficients[j].to(dtype) / some.size(name) * scores[j]
        torch.testing.assert_close(total[name], expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(total.part(name, 1, 4), expected[1:4], rtol=1e-5, atol=1e-6)


def test_given_numbers() -> None:
    values = {"first": torch.randn(5, 7, 12), "second": torch.randn(5, 300).double()}
    some = GivenNoise(values, {"second": 2.0})
    assert some.count == 5 and some.names == ("first", "second")
    assert torch.equal(some.dense("first", IDS), values["first"][IDS])
    assert torch.equal(some.dense("second", IDS), 2 * values["second"][IDS])
    total = NoiseSum(some, torch.zeros(4, dtype=torch.int64), IDS, torch.ones(4), 1)
    torch.testing.assert_close(total["second"][0], values["second"][IDS].sum(0) / 2)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"SiteNoise\(law=...\) must be one of .*, got 'cauchy'"):
        noise("cauchy")
    with pytest.raises(ValueError, match=r"scales=...\) must be positive, got 0.0 for 'head'"):
        noise(scales={"head": 0.0})
    with pytest.raises(UsageError, match=r"only=...\) names 'tail', which is no layer"):
        noise(only=("tail",))
    with pytest.raises(ValueError, match="as many numbers for every layer"):
        GivenNoise({"a": torch.zeros(1), "b": torch.zeros(2)})
    with pytest.raises(KeyError):
        NoiseSum(noise(only=("head",)), IDS, IDS, torch.ones(4), 5)["first"]
