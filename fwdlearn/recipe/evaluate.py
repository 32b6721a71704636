"""A finished run's model on its data again, or on other data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fwdlearn.errors import MissingError
from fwdlearn.recipe.build import assemble
from fwdlearn.recipe.load import load_recipe
from fwdlearn.recipe.weights import DESCRIPTION, load_model


def evaluate(run: Path, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Loss, and accuracy where the data has classes.

    Args:
        run: a run's folder.
        overrides: `key=value`, such as `data.evaluation_path=other.jsonl`.

    Raises:
        MissingError: the folder holds no run, or no weights yet.
        RecipeError: the overrides do not fit.
    """
    recipe_file = run / "resolved.yaml"
    if not recipe_file.exists():
        raise MissingError(f"{run} holds no run (no resolved.yaml); give the folder of a run.")
    model = run / "model"
    if not model.is_dir():
        raise MissingError(f"{model} is not there: the run saved no weights; train it again.")
    own_format = (model / DESCRIPTION).exists()
    words = list(overrides) if own_format else [f"model.path={model}", *overrides]
    assembly = assemble(load_recipe(str(recipe_file), words))
    if own_format:
        load_model(assembly.trainer.model, model)
    return dict(assembly.trainer.evaluate())
