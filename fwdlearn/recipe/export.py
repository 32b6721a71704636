"""A run's model or ledger as something that leaves the run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fwdlearn.errors import UsageError
from fwdlearn.ledger.files import replace_file, storing
from fwdlearn.recipe.folder import status
from fwdlearn.recipe.replay import ledger_of, recipe_of, replay
from fwdlearn.recipe.weights import DESCRIPTION, WEIGHTS, read_model

FORMATS = ("transformers", "safetensors", "ledger")


def export(run: Path, form: str, out: Path) -> None:
    """Writes what a run has come to.

    A run that has not finished is replayed to its last step; of one that diverged it is the last
    good step.

    Args:
        run: its folder.
        form: `transformers`, a folder that `from_pretrained` loads; `safetensors`, one file with
            every tensor once; or `ledger`, for `fwdlearn apply`.
        out: where, a new name.

    Raises:
        MissingError: the folder holds no run or no ledger.
        UsageError: the format is unknown, `out` is there, or the model is none of transformers.
        StorageError: something is damaged or cannot be written.
    """
    if form not in FORMATS:
        raise UsageError(f"--format must be one of {', '.join(FORMATS)}; got {form!r}.")
    if out.exists():
        raise UsageError(f"{out} is there already; choose another name for --out")
    if form == "ledger":
        recipe_of(run)
        ledger = ledger_of(run)
        with storing(out):
            replace_file(out, lambda file: file.write(ledger.path.read_bytes()[: ledger.end]))
        return
    with _model(run, out) as folder:
        own = (folder / DESCRIPTION).exists()
        if form == "transformers" and own:
            raise UsageError(f"{run} trains no model of transformers; --format safetensors works.")
        if own:
            # For the digests.
            read_model(folder)
        with storing(out):
            if form == "transformers":
                partial = out.with_name(f".{out.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(folder, partial)
                partial.rename(out)
            else:
                weights = folder / WEIGHTS
                replace_file(out, lambda file: file.write(weights.read_bytes()))


@contextmanager
def _model(run: Path, out: Path) -> Iterator[Path]:
    """A folder with the last weights of a run."""
    if status(run) in ("finished", "diverged") and (run / "model").is_dir():
        yield run / "model"
        return
    again = replay(run)
    with storing(out.parent):
        temporary = tempfile.TemporaryDirectory(dir=out.parent)
    with temporary as folder:
        again.save(Path(folder) / "model")
        yield Path(folder) / "model"
