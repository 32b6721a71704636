"""Losses from a function that is no torch model: a remote API, another runtime, a simulator."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn, Self

import numpy as np
import torch
from torch import Tensor, nn

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine.calls import Calls
from fwdlearn.engine.measured import Measured
from fwdlearn.errors import UsageError
from fwdlearn.objectives import returned
from fwdlearn.oracle import forbid_backward


class BlackBox(nn.Module):
    """Parameters, and a function of them that nothing here can look into.

    It is a module so that optimizers, devices and files find its parameters as they find a
    model's; it has no forward pass of its own.

    Args:
        params: name -> floating-point tensor or array, which training writes on.
        function: (params, rows) -> one loss for each row, or one output for each row if the
            objective makes losses of them. `params` maps the names to tensors of the function's
            own; `rows` is a `Batch`. It may return a tensor, an array or a list.
        numpy: whether the function takes numpy arrays instead of tensors, in `rows` too.
        workers: calls that may be under way at once, each in a thread of its own; with more than
            one, the function must not share what it writes on (`torch.func.functional_call` writes
            on the module for a while).
        rows_per_call: the most rows that one call takes, or None for no limit.

    Raises:
        UsageError: a setting is out of range, or a parameter cannot be held.

    Example:
        >>> def simulate(params, rows):
        ...     return (params["speed"] * rows.args[0] - rows.targets) ** 2
        >>> box = BlackBox({"speed": torch.ones(())}, simulate)
        >>> oracle = CallableOracle(box, Batch((torch.tensor([1.0, 2.0]),), torch.zeros(2)))
        >>> oracle.losses(torch.tensor([0, 1, 1])).tolist(), oracle.queries
        ([1.0, 4.0, 4.0], 3)
    """

    function: Callable[[Mapping[str, Any], Batch], Any]

    def __init__(
        self,
        params: Mapping[str, Tensor | np.ndarray],
        function: Callable[[Mapping[str, Any], Batch], Any],
        *,
        numpy: bool = False,
        workers: int = 1,
        rows_per_call: int | None = None,
    ) -> None:
        super().__init__()
        if workers < 1:
            raise UsageError(f"BlackBox(workers=...) must be at least 1, got {workers}.")
        if rows_per_call is not None and rows_per_call < 1:
            raise UsageError(
                f"BlackBox(rows_per_call=...) must be at least 1, got {rows_per_call}."
            )
        # Not as an attribute of a module, which would take in the parameters of a callable one.
        self.__dict__["function"] = function
        self.numpy, self.workers, self.rows_per_call = numpy, workers, rows_per_call
        for name, value in params.items():
            self._hold(name, torch.as_tensor(value))

    def train(self, mode: bool = True) -> Self:
        """Refuses training mode, of which the function would know nothing."""
        if mode:
            raise UsageError("a black box has no training mode; leave train_mode off.")
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """A black box is asked through an oracle."""
        raise UsageError("a BlackBox is no model to call; ask a CallableOracle, or train it.")

    def _hold(self, name: str, value: Tensor) -> None:
        if self.numpy and value.dtype == torch.bfloat16:
            raise UsageError(f"BlackBox(numpy=True): {name} is bfloat16, which numpy lacks.")
        *folders, last = name.split(".")
        holder: nn.Module = self
        try:
            parameter = nn.Parameter(value, requires_grad=value.is_floating_point())
            for folder in folders:
                if folder not in holder._modules:
                    holder.add_module(folder, nn.Module())
                holder = holder.get_submodule(folder)
            holder.register_parameter(last, parameter)
        except (KeyError, TypeError) as error:
            raise UsageError(
                f"BlackBox(params=...): {name!r} cannot name a parameter, because a module has "
                "that name for something else; give it another."
            ) from error


class CallableOracle:
    """A LossOracle on a black box and a batch: perturbs, counts queries.

    Queries at one direction and scale go into one call. Losses that are not finite are passed on.

    Args:
        box: the parameters and the function.
        batch: the rows.
        objective: (output, targets) -> losses [rows]; by default what the function returned.
    """

    def __init__(
        self,
        box: BlackBox,
        batch: Batch,
        objective: Callable[[Any, Tensor], Tensor] = returned,
    ) -> None:
        self._calls, self._batch, self._queries = Calls(box, objective), batch, 0
        self._known: Tensor | None = None
        self._params = {name: value.detach() for name, value in self._calls.params.items()}

    @property
    def params(self) -> Mapping[str, Tensor]:
        """Name -> trainable tensor, read only."""
        return self._params

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self._batch)

    @property
    def queries(self) -> int:
        """Queries answered so far."""
        return self._queries

    def losses(
        self,
        row: Tensor,
        directions: Directions | None = None,
        direction: Tensor | None = None,
        scale: Tensor | float = 0.0,
    ) -> Tensor:
        """See `LossOracle.losses`; raises UsageError where the function fails.

        What `measure` has shown is answered without a query.
        """
        if directions is None and self._known is not None:
            return self._known[row]
        with forbid_backward():
            losses = self._calls.losses(self._batch, row, directions, direction, scale)
        self._queries += len(row) * self._batch.passes
        return losses.clone()

    def measure(self, residual: bool, keep: bool = False) -> Measured:
        """See `fwdlearn.signals.Measuring`; there are no layers whose inputs could be kept."""
        with forbid_backward():
            clean = self._calls.measure(self._batch, residual)
        self._queries += self.rows * self._batch.passes
        self._known = clean.losses.clone()
        return clean

    def only(self, names: Collection[str]) -> Self:
        """The same oracle for a step that is about some parameters alone."""
        other = copy.copy(self)
        other._params = {name: self._params[name] for name in names}
        return other
