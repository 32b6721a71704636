"""metrics.jsonl and tensorboard."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fwdlearn.errors import StorageError
from fwdlearn.sinks import Sink
from fwdlearn.sinks.jsonl import JsonLines
from fwdlearn.sinks.tensorboard import Tensorboard


def test_every_line_is_json_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    sink = JsonLines(file)
    assert isinstance(sink, Sink)
    sink.start({})
    sink.log({"step": 1, "train.loss": math.nan, "snr": -math.inf, "lr": torch.tensor(0.5)})
    sink.log({"step": 2, "train.loss": 1.5, "snr": None})
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0] == {"step": 1, "train.loss": None, "snr": None, "lr": 0.5}
    assert lines[1] == {"step": 2, "train.loss": 1.5, "snr": None}
    sink.finish({})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_storage_error() -> None:
    sink = JsonLines(Path("/dev/full"))
    sink.start({})
    with pytest.raises(StorageError, match="/dev/full: cannot be written: No space left"):
        sink.log({"step": 1})


def test_a_folder_that_is_not_there_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="output.dir=DIR"):
        JsonLines(tmp_path / "no" / "metrics.jsonl").start({})


def test_tensorboard_writes_events(tmp_path: Path) -> None:
    sink = Tensorboard(folder=tmp_path)
    assert isinstance(sink, Sink)
    sink.start({})
    sink.log({"step": 3, "train.loss": 1.5, "note": "text is left out"})
    sink.finish({"status": "finished"})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalar = events.Scalars("train/loss")[0]
    assert (scalar.step, scalar.value) == (3, 1.5)
