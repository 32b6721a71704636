"""A run's model or ledger as something that leaves the run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fwdlearn.errors import UsageError
from fwdlearn.ledger.files import replace_file, storing
from fwdlearn.ledger.records import LedgerWriter
from fwdlearn.models.lora import ADAPTER
from fwdlearn.recipe.apply import check_whole
from fwdlearn.recipe.folder import status
from fwdlearn.recipe.replay import ledger_of, listed, recipe_of, replay
from fwdlearn.recipe.weights import DESCRIPTION, WEIGHTS, read_model

FORMATS = ("transformers", "peft", "safetensors", "ledger")


def export(run: Path, form: str, out: Path) -> None:
    """Writes what a run has come to.

    A run that has not finished is replayed to its last step; of one that diverged it is the last
    good step.

    Args:
        run: its folder.
        form: `transformers`, a folder that `from_pretrained` loads; `peft`, a folder with the
            adapters of low rank alone, for `PeftModel.from_pretrained`; `safetensors`, one file
            with every tensor once; or `ledger`, for `fwdlearn apply`, which lists the entries of
            tables that the batches of the run read.
        out: where, a new name.

    Raises:
        MissingError: the folder holds no run or no ledger.
        UsageError: the format is unknown, `out` is there, the model has no such form, or the
            ledger is not all that the run was.
        StorageError: something is damaged or cannot be written.
    """
    if form not in FORMATS:
        raise UsageError(f"--format must be one of {', '.join(FORMATS)}; got {form!r}.")
    if out.exists():
        raise UsageError(f"{out} is there already; choose another name for --out")
    if form == "ledger":
        _ledger(run, out)
        return
    with _model(run, out) as folder:
        own, weights = (folder / DESCRIPTION).exists(), folder / WEIGHTS
        if form == "transformers" and own:
            raise UsageError(f"{run} trains no model of transformers; --format safetensors works.")
        if form == "peft" and not (folder / ADAPTER).is_dir():
            other = "safetensors" if own else "transformers"
            raise UsageError(
                f"{run} trains no adapters; model.lora=RANK gives a model of transformers some. "
                f"--format {other} writes all of the model that it trains."
            )
        if form == "safetensors" and not weights.exists():
            raise UsageError(
                f"{run} keeps its weights in several files; --format transformers writes them all."
            )
        if own:
            # For the digests.
            read_model(folder)
        with storing(out):
            if form == "safetensors":
                replace_file(out, lambda file: file.write(weights.read_bytes()))
            else:
                partial = out.with_name(f".{out.name}.partial")
                shutil.rmtree(partial, ignore_errors=True)
                shutil.copytree(folder / ADAPTER if form == "peft" else folder, partial)
                partial.rename(out)


def _ledger(run: Path, out: Path) -> None:
    """Writes the ledger of a run so that it can be applied without the data."""
    recipe_of(run)
    ledger = ledger_of(run)
    check_whole(ledger)
    if any(record.entries is None for record in ledger):
        records = listed(run)
        with storing(out):
            LedgerWriter.create(out, ledger.header, records).close()
        return
    with storing(out):
        replace_file(out, lambda file: file.write(ledger.path.read_bytes()[: ledger.end]))


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
