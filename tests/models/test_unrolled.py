"""torch's recurrent layers unrolled: the same outputs from the same weights, trained, and back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from fwdlearn.allocators import Uniform
from fwdlearn.data import Data, DataInfo, Rows
from fwdlearn.errors import UsageError
from fwdlearn.estimators import ForwardGradient, RandomPerturbation
from fwdlearn.models import Unrolled, roll, unroll
from fwdlearn.models.built import weights_from
from fwdlearn.objectives import cross_entropy
from fwdlearn.trainer import Trainer

LAYERS: dict[str, Callable[..., nn.RNNBase]] = {
    "tanh": nn.RNN,
    "relu": lambda *sizes, **more: nn.RNN(*sizes, nonlinearity="relu", **more),
    "gru": nn.GRU,
    "lstm": nn.LSTM,
    "lstm with projection": lambda *sizes, **more: nn.LSTM(*sizes, proj_size=3, **more),
}
CASES = [
    (name, layers, bidirectional, bias, first)
    for name in LAYERS
    for layers, bidirectional, bias, first in product((1, 3), *[(False, True)] * 3)
]


def _made(make: Callable[..., nn.Module], *sizes: int, **settings: Any) -> Any:
    with weights_from(0):
        return make(*sizes, **settings)


def _noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _flat(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [t for one in output for t in _flat(one)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "layers", "bidirectional", "bias", "first"), CASES)
def test_outputs_are_torchs(
    name: str, layers: int, bidirectional: bool, bias: bool, first: bool, dtype: torch.dtype
) -> None:
    more = {"num_layers": layers, "bidirectional": bidirectional, "bias": bias}
    layer = _made(LAYERS[name], 4, 5, batch_first=first, dtype=dtype, **more)
    twin, x = unroll(layer), _noise(3, 7, 4).to(dtype)
    assert isinstance(twin, Unrolled)
    assert list(twin.state_dict()) == list(layer.state_dict())
    for ours, theirs in zip(twin.parameters(), layer.parameters(), strict=True):
        assert ours is theirs
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    with torch.no_grad():
        _, final = layer(x)
        begun = final if isinstance(final, tuple) else (final,)
        begun = tuple(0.3 * value for value in begun)
        hx = begun if isinstance(final, tuple) else begun[0]
        single = tuple(value[:, 0] for value in begun)
        for args in ((x,), (x, hx), (x[0],), (x[0], single if len(begun) > 1 else single[0])):
            if args[0].dim() == 3 or len(args) == 1 or first:
                pairs = zip(_flat(twin(*args)), _flat(layer(*args)), strict=True)
                for ours, theirs in pairs:
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
        back = roll(twin)
        assert type(back) is type(layer)
        for ours, theirs in zip(_flat(back(x, hx)), _flat(layer(x, hx)), strict=True):
            assert torch.equal(ours, theirs)
    for ours, theirs in zip(back.parameters(), layer.parameters(), strict=True):
        assert ours is theirs


@pytest.mark.parametrize("name", list(LAYERS))
def test_steps_are_the_whole(name: str) -> None:
    twin, x = unroll(_made(LAYERS[name], 4, 5, num_layers=2, batch_first=True)), _noise(3, 7, 4)
    assert isinstance(twin, Unrolled)
    with torch.no_grad():
        state, parts = twin.initial(3), []
        for x_t in x.unbind(1):
            y, state = twin.step(x_t, state)
            parts.append(y)
        whole, _ = twin(x)
    torch.testing.assert_close(torch.stack(parts, 1), whole, rtol=0, atol=1e-6)


class Tagger(nn.Module):
    """A user's own: an embedding, two recurrent layers, one of them used twice, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.parts = nn.ModuleDict({"lstm": nn.LSTM(4, 4, 2, batch_first=True)})
        self.gru = nn.GRU(4, 3, batch_first=True, bidirectional=True)
        self.again = self.parts["lstm"]
        self.register_buffer("scale", torch.ones(()))
        self.head = nn.Linear(6, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.parts["lstm"](self.embedding(tokens))
        x, _ = self.again(x)
        self.gru.flatten_parameters()
        assert self.gru.hidden_size == 3
        x, _ = self.gru(x)
        out: Tensor = self.head(x[:, -1]) * self.scale
        return out


TOKENS = torch.arange(42).view(6, 7) * 5 % 7


def test_a_users_module_is_unrolled_where_it_stands() -> None:
    model = _made(Tagger)
    twin = unroll(model)
    assert type(twin) is Tagger and twin is not model
    assert type(model.gru) is nn.GRU and type(twin.gru) is Unrolled
    assert twin.again is twin.parts["lstm"]
    assert list(twin.state_dict()) == list(model.state_dict())
    assert twin.scale is model.scale and twin.head.weight is model.head.weight
    with torch.no_grad():
        torch.testing.assert_close(twin(TOKENS), model(TOKENS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("estimator", [RandomPerturbation(), ForwardGradient()])
def test_it_trains_forward_only_and_goes_back(estimator: Any) -> None:
    model = _made(Tagger)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin = unroll(model)
    data = Data(DataInfo("tokens", (7,), 5), Rows(TOKENS, TOKENS[:, 0] % 5))
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.02)
    parts = (cross_entropy, estimator, Uniform(8, sharing="private"), optimizer)
    trainer = Trainer(twin, data, *parts, batch_size=6, steps=40)
    start = trainer.evaluate(data.train)["loss"]
    assert trainer.train()["engine.rung"] == "fold"
    trained = trainer.evaluate(data.train)["loss"]
    assert trained < 0.8 * start
    back = roll(twin)
    assert type(back) is Tagger and type(back.parts["lstm"]) is nn.LSTM
    assert all(not torch.equal(v, before[n]) for n, v in back.state_dict().items() if n != "scale")
    fresh = _made(Tagger)
    fresh.load_state_dict(twin.state_dict())
    with torch.no_grad():
        # The module it began with, the one it went back to, and one that read the weights.
        assert torch.equal(back(TOKENS), model(TOKENS))
        assert torch.equal(back(TOKENS), fresh(TOKENS))
        torch.testing.assert_close(back(TOKENS), twin(TOKENS), rtol=0, atol=1e-6)


def test_dropout_is_between_layers_and_in_training_alone() -> None:
    layer = _made(nn.GRU, 4, 5, num_layers=2, dropout=0.5, batch_first=True).eval()
    twin, x = unroll(layer), _noise(3, 7, 4)
    assert not twin.training
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.testing.assert_close(twin(x)[0], layer(x)[0], rtol=0, atol=1e-6)
        twin.train()
        torch.manual_seed(0)
        assert not torch.equal(twin(x)[0], twin(x)[0])


class Peephole(nn.LSTM):
    """Of a class of its own."""


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: unroll(nn.Linear(2, 2)), r"unroll\(Linear\) finds no nn.RNN, nn.GRU or nn.LSTM"),
        (lambda: unroll(_made(Peephole, 2, 2)), "and Peephole is a class of its own"),
        (lambda: roll(nn.Linear(2, 2)), r"roll\(Linear\) finds nothing that unroll has made"),
        (lambda: _packed(), "LSTM unrolled takes padded tensors and no PackedSequence"),
        (lambda: _both().step(_noise(3, 4), {}), "a bidirectional GRU has no steps"),
    ],
)
def test_messages(act: Callable[[], Any], message: str) -> None:
    before = torch.get_rng_state()
    with pytest.raises(UsageError, match=message):
        act()
    torch.set_rng_state(before)


def _packed() -> Any:
    packed = pack_padded_sequence(_noise(3, 7, 4), torch.tensor([7, 5, 2]), batch_first=True)
    return unroll(_made(nn.LSTM, 4, 5, batch_first=True))(packed)


def _both() -> Any:
    return unroll(_made(nn.GRU, 4, 5, bidirectional=True))
