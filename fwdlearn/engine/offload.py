"""Weights that are not on the device: each comes when an operation takes it, and goes again.

Between passes a parameter is what it is on the host, where everything else finds an ordinary
model. While passes run, its place is taken by one number on the device that is expanded to its
shape and takes no memory, and a torch function mode hands operations a copy instead. The mode lies
below all others, so that these see the parameters themselves: nothing that perturbs, traces or
differentiates knows of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fwdlearn.engine.at_use import SIZES
from fwdlearn.engine.fold import replaced
from fwdlearn.engine.stores import Folder, Memory, Store
from fwdlearn.engine.units import whole_units
from fwdlearn.engine.window import Window
from fwdlearn.errors import UsageError
from fwdlearn.memory import private_bytes

# Bytes of tensors whose memory goes back to the system at once where it is short.
_LARGE = 2**24
# A stand-in has all of these but strides, and is to be set and shown itself.
_ITS_OWN = SIZES - {"stride"} | {"__len__", "__hash__", "__repr__", "requires_grad_"}


class Resident:
    """Weights that are on the device.

    Attributes:
        kept_pages: see `keep_freed_pages`.
    """

    kept_pages = 2**30

    def passing(self) -> AbstractContextManager[object]:
        """Within, passes can run."""
        return nullcontext()

    def check(self, losses: Tensor) -> None:
        """Looks at the losses of a first pass."""

    def empty(self, size: int) -> Tensor:
        """uint8 [size], for what is to become of weights or of what an optimizer keeps of them."""
        return torch.empty(size, dtype=torch.uint8)

    def updating(
        self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter
    ) -> AbstractContextManager[object]:
        """Within, an optimizer can take a step of one parameter."""
        return nullcontext()


class Offload(Resident):
    """Keeps the weights of a model on the host.

    On a CPU a folder alone is enough: weights are used where they are mapped.

    Args:
        model: any module, on any device; its parameters and buffers are moved.
        device: where passes run.
        folder: for files that hold the weights; None keeps them in memory.

    Attributes:
        apart: whether the device has copies of its own while it uses weights.
        before: bytes of the process's own memory when the weights began to move.

    Raises:
        UsageError: the model is compiled, or holds weights that are no plain tensors.
        StorageError: the folder cannot be written to, or is full.
    """

    def __init__(
        self, model: nn.Module, device: str | torch.device, folder: str | Path | None = None
    ) -> None:
        self.device = _with_number(torch.device(device))
        self.folder = None if folder is None else Path(folder)
        self.apart = self.device.type != "cpu" or folder is None
        if folder is not None:
            # Between large tensors of many sizes, what is kept would grow into the room of files.
            self.kept_pages = _LARGE
        _check(model)
        self.before = private_bytes()
        self._store: Store = Memory(self.device) if folder is None else Folder(folder)
        self._kept: dict[int, torch.UntypedStorage] = {}
        self._params = list(model.parameters())
        self._names = {id(value): name for name, value in model.named_parameters()}
        self._hosts: dict[int, Tensor] = {}
        with torch.no_grad():
            for buffer in model.buffers():
                buffer.data = buffer.data.to(self.device)
            for parameter in self._params:
                host = self._hosts[id(parameter)] = self._hosted(parameter.data)
                parameter.data = host
                parameter._fwdlearn_home = self  # type: ignore[attr-defined]
        self._kept.clear()
        self._stand_ins = {id(p): _stand_in(p, self.device) for p in self._params}
        self._window = Window(self._hosts, self.device)
        self._mode = _Bringing(self._window)
        self._units = whole_units(model, self._mode, self._hosts) if self.apart else ()
        self._depth = 0

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A model that is pickled leaves it behind."""
        return type(None), ()

    @property
    def bytes(self) -> int:
        """Of the weights."""
        return sum(value.nbytes for value in self._params)

    def on_host(self, device: torch.device) -> bool:
        """Whether weights lie in the very memory that `device` computes in."""
        return self.folder is None and device.type == "cpu"

    @property
    def most(self) -> int:
        """Bytes of weights that passes had on the device at once so far."""
        return self._window.most

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Within, passes can run; outside, parameters are what the host has.

        Raises:
            UsageError: an operation has written into a weight.
        """
        if not self.apart or self._depth:
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
            return
        self._depth = 1
        # One that is being updated is on the device meanwhile.
        before = {id(parameter): parameter.data for parameter in self._params}
        try:
            self._set(self._stand_ins)
            with ExitStack() as stack:
                stack.enter_context(self._mode)
                for unit in self._units:
                    stack.enter_context(unit)
                yield
        finally:
            self._depth = 0
            self._window.clear()
            self._set(before)

    @contextmanager
    def updating(self, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Iterator[None]:
        """Within, a parameter and what an optimizer keeps of it are on the device; both go back."""
        host, before = self._hosts[id(parameter)], dict(_tensors(optimizer, parameter))
        if self.apart:
            for name, value in before.items():
                optimizer.state[parameter][name] = value.to(self.device, copy=True)
            parameter.data = host.to(self.device, copy=True)
        try:
            yield
        finally:
            if self.apart:
                host.copy_(parameter.data)
                parameter.data = host
            for name, value in dict(_tensors(optimizer, parameter)).items():
                old = before.get(name)
                optimizer.state[parameter][name] = self._back(old, value)

    def empty(self, size: int) -> Tensor:
        """See `Resident.empty`."""
        return super().empty(0).set_(self._store.empty(size), 0, (size,), (1,))

    def stand_in(self, parameter: Tensor) -> Tensor:
        """What takes the place of a parameter while passes run."""
        return self._stand_ins[id(parameter)]

    def check(self, losses: Tensor) -> None:
        """Looks at the losses of a first pass.

        Raises:
            UsageError: they are no numbers, and there are weights that no operation was seen to
                take.
        """
        if not self.apart or torch.isfinite(losses).all():
            return
        hidden = [name for key, name in self._names.items() if key not in self._window.seen]
        if hidden:
            raise UsageError(
                "trainer.offload brings weights to the operations of a model, and none was seen to "
                f"take {hidden[0]}, though the loss is no number without it; let the model use it "
                "by functions of torch, or leave trainer.offload out."
            )

    def _set(self, values: Mapping[int, Tensor]) -> None:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for parameter in self._params:
                parameter.data = values[id(parameter)]

    def _back(self, old: Tensor | None, value: Tensor) -> Tensor:
        """What an optimizer keeps, on the host; in the place where it lay, if it still fits."""
        if old is not None and getattr(old, "_fwdlearn_kept", False):
            if value is old:
                return old
            if (old.shape, old.dtype) == (value.shape, value.dtype):
                return old.copy_(value)
        if value.untyped_storage().nbytes() > value.nbytes:
            # What else lies there is not to be kept with it.
            value = value.clone()
        host = self._hosted(value)
        self._kept.clear()
        host._fwdlearn_kept = True  # type: ignore[attr-defined]
        return host

    def _hosted(self, value: Tensor) -> Tensor:
        """The same tensor on the host; those that share memory share it there."""
        storage = value.untyped_storage()
        key = storage.data_ptr()
        if key not in self._kept:
            self._kept[key] = self._store.keep(storage)
        empty = torch.empty(0, dtype=value.dtype)
        return empty.set_(self._kept[key], value.storage_offset(), value.shape, value.stride())


class _Bringing(TorchFunctionMode):
    """Hands operations the copies of the parameters that they take."""

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        wanted: dict[int, Tensor] = {}
        self._find(args, wanted)
        if kwargs:
            self._find(kwargs.values(), wanted)
        if not wanted:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in _ITS_OWN or name == "__get__":
            found = func(*args, **kwargs)
            if not isinstance(found, Tensor):
                return found
        copies = self.window.take(wanted)
        versions = {key: copy._version for key, copy in copies.items()}

        def seen(value: Tensor) -> Tensor:
            return copies.get(id(value), value)

        out = func(*replaced(args, seen), **replaced(kwargs, seen))
        for key, copy in copies.items():
            if copy._version != versions[key]:
                raise UsageError(
                    f"{name}() writes into a weight while the model runs, and with trainer.offload "
                    "that is a copy; leave trainer.offload out, or write it so that it does not."
                )
            # An operation may hand back what it was given.
            if out is copy:
                return wanted[key]
        return out

    def _find(self, values: Iterable[Any], wanted: dict[int, Tensor]) -> None:
        known = self.window.hosts
        for value in values:
            if isinstance(value, Tensor):
                if id(value) in known:
                    wanted[id(value)] = value
            elif isinstance(value, (tuple, list)):
                self._find(value, wanted)
            elif isinstance(value, dict):
                self._find(value.values(), wanted)


def home_of(params: Mapping[str, Tensor]) -> Resident:
    """What knows where some parameters lie."""
    for value in params.values():
        found = getattr(value, "_fwdlearn_home", None)
        if isinstance(found, Resident):
            return found
    return _RESIDENT


def on_device(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name -> a tensor of a parameter's shape and dtype, on the device where passes run.

    Its values are the parameter's, unless that is offloaded.
    """
    return {
        name: value._fwdlearn_home.stand_in(value) if is_offloaded(value) else value.detach()  # type: ignore[attr-defined]
        for name, value in params.items()
    }


def is_offloaded(value: Tensor) -> bool:
    """Whether a parameter has no lasting place on the device."""
    home = getattr(value, "_fwdlearn_home", None)
    return isinstance(home, Offload) and home.apart


_RESIDENT = Resident()


def _with_number(device: torch.device) -> torch.device:
    """Tensors of a CUDA device say which."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _stand_in(parameter: Tensor, device: torch.device) -> Tensor:
    """Not a number, so that a use that is not seen shows."""
    one = torch.full((), float("nan") if parameter.is_floating_point() else 0, device=device)
    return one.to(parameter.dtype).expand(parameter.shape)


def _tensors(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter
) -> Iterator[tuple[str, Tensor]]:
    """What an optimizer keeps of a parameter, but for the count of its steps."""
    if parameter in optimizer.state:
        for name, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor) and name != "step":
                yield name, value


def _check(model: nn.Module) -> None:
    for name, module in model.named_modules():
        compiled = getattr(module, "_compiled_call_impl", None) is not None
        if (
            compiled
            or isinstance(module, torch.jit.ScriptModule)
            or type(module).__name__ == "OptimizedModule"
        ):
            raise UsageError(
                f"trainer.offload brings weights to the operations of a model, and "
                f"{name or type(model).__name__} is compiled, so that they cannot be seen; offload "
                "the module that it was made of."
            )
    for name, parameter in model.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.layout is not torch.strided:
            raise UsageError(
                f"trainer.offload moves plain tensors, and {name} is a {type(parameter).__name__} "
                f"({parameter.layout}); leave trainer.offload out."
            )
        if parameter.device.type == "meta":
            raise UsageError(f"{name} is on the meta device and has no values; load them first.")
