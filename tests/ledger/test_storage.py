"""Full disks, folders that can only be read, clocks that jump, signals: nothing is lost."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fwdlearn.cli import main
from fwdlearn.ledger.records import Ledger
from tests.ledger.killing import CASES, SGD, left, recipe, start

pytestmark = pytest.mark.skipif(os.name != "posix", reason="limits and users as POSIX has them")
WORDS = ["output.snapshot_seconds=0", "--quiet"]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that every user of the machine can look into."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "r.yaml").write_text(CASES["perturbation-adam"])
        yield folder


def _train(folder: Path, name: str, **limits: Any) -> tuple[int, str]:
    """Exit status, and what was said."""
    log = folder / f"{name}.txt"
    log.touch()
    log.chmod(0o666)
    before = log.stat().st_size
    words = [str(folder / "r.yaml"), f"output.dir={folder / name}", *WORDS]
    process = start(words, log, **limits)
    process.join()
    return process.exitcode, log.read_text()[before:]


def test_a_disk_that_is_full_until_there_is_room(open_folder: Path) -> None:
    assert _train(open_folder, "whole")[0] == 0
    wanted, steps = left(open_folder / "whole"), []
    # Too little for the recipe, and for a snapshot.
    for most in (500, 3000):
        code, said = _train(open_folder, f"run-{most}", most=most)
        assert code == 5, said
        (line,) = [one for one in said.splitlines() if one.startswith(str(open_folder))]
        assert "cannot be written: File too large; free some space" in line
        assert "Traceback" not in said
        path = open_folder / f"run-{most}" / "ledger.bin"
        steps.append(Ledger(path).steps if path.exists() else 0)
        code, said = _train(open_folder, f"run-{most}")
        assert code == 0, said
        assert left(open_folder / f"run-{most}") == wanted
    assert steps[0] == 0 < steps[1]


def _read_only(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Lets nothing be written below a folder, as a file system that is mounted so does."""

    def refuse(path: Any, writes: bool = True) -> None:
        if writes and str(path).startswith(str(folder)):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def guard(name: str) -> None:
        real = getattr(os, name)

        def guarded(path: Any, *args: Any, **more: Any) -> Any:
            refuse(path)
            return real(path, *args, **more)

        patch.setattr(os, name, guarded)

    for name in ("mkdir", "replace", "rename", "unlink", "rmdir"):
        guard(name)
    os_open, path_open = os.open, Path.open

    def open_(path: Any, flags: int, *args: Any, **more: Any) -> int:
        refuse(path, bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)))
        return os_open(path, flags, *args, **more)

    def opened(path: Path, mode: str = "r", *args: Any, **more: Any) -> Any:
        refuse(path, bool(set("wax+") & set(mode)))
        return path_open(path, mode, *args, **more)

    patch.setattr(os, "open", open_)
    patch.setattr(Path, "open", opened)


def test_a_folder_that_can_only_be_read(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_folder / "run"
    words = ["train", str(open_folder / "r.yaml"), f"output.dir={run}", *WORDS]

    def refused() -> None:
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        capsys.readouterr()
        with monkeypatch.context() as patch:
            _read_only(patch, open_folder)
            assert main(words) == 5
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(str(run)) and "Read-only file system; free some space" in line
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before

    refused()
    assert main(words) == 0
    wanted, end = left(run), Ledger(run / "ledger.bin").end_of(12)
    with (run / "ledger.bin").open("r+b") as file:
        file.truncate(end)
    (run / "summary.json").write_text('{"status": "running"}')
    refused()
    assert main(words) == 0
    assert left(run) == wanted


def test_clocks_that_jump(open_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", str(open_folder / "r.yaml"), *WORDS]
    assert main([*words, f"output.dir={open_folder / 'whole'}"]) == 0
    jumps = itertools.cycle((2e9, 0.0, 4e9, 1.0, 1e9))
    run = open_folder / "run"
    gmtime = time.gmtime
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    monkeypatch.setattr(time, "gmtime", lambda seconds=None: gmtime(next(jumps)))
    assert main([*words, f"output.dir={run}"]) == 0
    end = Ledger(run / "ledger.bin").end_of(12)
    with (run / "ledger.bin").open("r+b") as file:
        file.truncate(end)
    (run / "summary.json").write_text('{"status": "running"}')
    assert main([*words, f"output.dir={run}"]) == 0
    assert left(run) == left(open_folder / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_two_passes_at_most_after_a_signal(open_folder: Path, number: signal.Signals) -> None:
    passes = open_folder / "passes"
    model = f"{{name: 'tests.ledger.parts:counted', path: {passes}}}"
    (open_folder / "r.yaml").write_text(recipe("{name: RandomPerturbation}", SGD, model))
    words = [str(open_folder / "r.yaml"), f"output.dir={open_folder / 'run'}", *WORDS]
    process = start(words, open_folder / "log.txt")
    ledger = open_folder / "run" / "ledger.bin"
    while not ledger.exists():
        assert process.is_alive(), (open_folder / "log.txt").read_text()
        time.sleep(0.05)
    # In the middle of a pass, as nearly as can be said.
    before = passes.stat().st_size
    while passes.stat().st_size == before:
        time.sleep(0.01)
    before = passes.stat().st_size
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 128 + number
    assert passes.stat().st_size - before <= 2
    assert Ledger(ledger).steps >= 1
