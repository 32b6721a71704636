"""TensorBoard event files in the run's folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fwdlearn.errors import MissingError
from fwdlearn.sinks import Record


@dataclass
class Tensorboard:
    """TensorBoard event files; look at them with `tensorboard --logdir runs`.

    Args:
        subfolder: where in the run's folder.
        folder: the run's folder.
    """

    subfolder: str = "tensorboard"
    folder: Path = Path(".")

    def start(self, meta: Record) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingError("not installed; pip install fwdlearn[tensorboard]") from error
        self._writer = SummaryWriter(str(self.folder / self.subfolder))

    def log(self, record: Record) -> None:
        step = int(record.get("step", 0))
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name.replace(".", "/"), value, step)

    def finish(self, summary: Record) -> None:
        self._writer.close()
