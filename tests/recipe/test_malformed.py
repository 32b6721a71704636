"""Every kind of mistake gives its line: where, which key, what is wrong, the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from fwdlearn.errors import FwdlearnError, MissingError, RecipeError
from fwdlearn.recipe.load import load_recipe

GOOD = """\
model: {name: mlp, hidden: [8]}
data: {name: digits}
estimator:
  name: RandomPerturbation
  sigma: 0.01
optimizer:
  name: Adam
  lr: 1e-3
trainer:
  batch_size: 16
  steps: 5
"""

SECTIONS = (
    "model, data, objective, estimator, allocator, optimizer, trainer, output, tracking, metrics, "
    "seed, compare"
)
CASES = {
    "comparison": (
        GOOD + "compare: {seeds: x, lrs: [0.1, y], backprop: 1, estimators: [{with: {seed: 1}}]}\n",
        [
            "12:18: compare.seeds: must be a list, each an integer, got 'x'",
            "12:32: compare.lrs[1]: must be a number, got 'y'",
            "12:46: compare.backprop: must be true or false, got 1",
            "12:62: compare.estimators[0]: `with` cannot change seed: methods are compared at the "
            "same one",
        ],
    ),
    "empty": ("", ["1:1: empty; start from `fwdlearn cp quickstart my.yaml`"]),
    "comment only": ("# hm\n", ["1:1: empty; start from `fwdlearn cp quickstart my.yaml`"]),
    "list": ("- 1\n", ["1:1: must be sections such as `model:`, not a list or a word"]),
    "tab": (
        GOOD.replace("  steps: 5", "\tsteps: 5"),
        ["11:1: a tab where YAML needs spaces; indent with spaces"],
    ),
    "unclosed list": (
        GOOD.replace("[8]", "[8"),
        [
            "1:30: not well-formed YAML: expected ',' or ']', but got '}' (while parsing a flow "
            "sequence); check indentation, colons and quotes"
        ],
    ),
    "colon in a value": (
        GOOD.replace("{name: digits}", "a: b"),
        [
            "2:8: not well-formed YAML: mapping values are not allowed here; check indentation, "
            "colons and quotes"
        ],
    ),
    "anchor": (
        GOOD.replace("lr: 1e-3", "lr: &lr 1e-3"),
        ["8:7: anchors and aliases are not used; repeat it"],
    ),
    "alias": (
        GOOD.replace("lr: 1e-3", "lr: *lr"),
        ["8:7: anchors and aliases are not used; repeat it"],
    ),
    "tag": (
        GOOD.replace("lr: 1e-3", "lr: !!float 1"),
        ["8:7: the tag tag:yaml.org,2002:float is not used; leave it out"],
    ),
    "second document": (
        GOOD + "---\nseed: 1\n",
        ["12:1: a second document starts here; a recipe is one document, remove the ---"],
    ),
    "too deep": (
        "model: " + "[" * 30 + "]" * 30,
        ["1:27: nested more than 20 levels deep; flatten it"],
    ),
    "too many": (
        "model: [" + "1," * 20_000 + "]",
        ["1:20003: more than 10000 values; a recipe is a page of settings"],
    ),
    "too large": (
        "#" * (256 * 1024 + 1),
        ["1:1: larger than 256 KiB; a recipe is a page of settings"],
    ),
    "control character": (GOOD + "\x07", ["12:1: the character U+0007 is not allowed in YAML"]),
    "duplicate key": (
        GOOD + "  steps: 6\n",
        ["12:3: trainer.steps: given twice (first on line 11); keep one"],
    ),
    "duplicate section": (
        GOOD + "data: {name: npz}\n",
        ["12:1: data: given twice (first on line 2); keep one"],
    ),
    "key that is a number": (
        GOOD.replace("  steps: 5", "  steps: 5\n  7: 8"),
        ["12:3: trainer: keys are words; the key 7 is not"],
    ),
    "infinity": (
        GOOD.replace("1e-3", ".inf"),
        ["8:7: optimizer.lr: .inf is not a finite number; give a finite one"],
    ),
    "overflow": (
        GOOD.replace("1e-3", "1e999"),
        ["8:7: optimizer.lr: 1e999 is not a finite number; give a finite one"],
    ),
    "unknown section": (
        GOOD + "tracker: {wandb: true}\n",
        ["12:1: tracker: unknown section; did you mean 'trainer'?"],
    ),
    "far section": (
        GOOD + "zzz: 1\n",
        [f"12:1: zzz: unknown section; choose from {SECTIONS}"],
    ),
    "key outside its section": (
        GOOD + "lr: 1\n",
        ["12:1: lr: unknown section; did you mean 'optimizer.lr'?"],
    ),
    "missing section": (
        GOOD.replace("data: {name: digits}\n", ""),
        ["1:1: data: missing; every recipe needs this section"],
    ),
    "section without content": (
        GOOD.replace("data: {name: digits}", "data:"),
        ["2:6: data: missing; every recipe needs this section"],
    ),
    "unknown key": (
        GOOD.replace("steps", "stpes"),
        ["11:3: trainer.stpes: unknown key; did you mean 'steps'?"],
    ),
    "neither steps nor queries": (
        GOOD.replace("  steps: 5\n", ""),
        ["9:1: trainer: neither steps nor queries is given; give one"],
    ),
    "both steps and queries": (
        GOOD + "  queries: 100\n",
        ["12:3: trainer.queries: given together with trainer.steps; remove one of the two"],
    ),
    "text for a number": (
        GOOD.replace("steps: 5", "steps: many"),
        ["11:10: trainer.steps: must be an integer, got 'many'"],
    ),
    "fraction for an integer": (
        GOOD.replace("steps: 5", "steps: 5.5"),
        ["11:10: trainer.steps: must be an integer, got 5.5"],
    ),
    "out of range": (
        GOOD.replace("batch_size: 16", "batch_size: 0"),
        ["10:15: trainer.batch_size: must be greater than or equal to 1, got 0"],
    ),
    "number for a boolean": (
        GOOD + "  train_mode: 1\n",
        ["12:15: trainer.train_mode: must be true or false, got 1"],
    ),
    "yes for a boolean": (
        GOOD + "  train_mode: yes\n",
        ["12:15: trainer.train_mode: must be true or false, got 'yes'"],
    ),
    "unknown device": (
        GOOD + "  device: gpu\n",
        ["12:11: trainer.device: must be auto, cpu, cuda or cuda:N, got 'gpu'"],
    ),
    "absent device": (
        GOOD + "  device: cuda:99\n",
        ["12:11: trainer.device: there is no CUDA device here; use auto or cpu"],
    ),
    "unknown unit": (
        GOOD + "  memory_budget: 2 GiBs\n",
        [
            "12:18: trainer.memory_budget: must be bytes, or a size such as 2 GiB, got '2 GiBs'",
        ],
    ),
    "negative seed": (
        GOOD + "seed: -1\n",
        ["12:7: seed: must be greater than or equal to 0, got -1"],
    ),
    "section that is a list": (
        GOOD.replace("{name: digits}", "[digits]"),
        ["2:7: data: must be `name:` and arguments, got ['digits']"],
    ),
    "output that is a word": (
        GOOD + "output: runs/x\n",
        ["12:9: output: must be keys and values, got 'runs/x'"],
    ),
    "unknown component": (
        GOOD.replace("RandomPerturbation", "RandomPertubation"),
        [
            "4:9: estimator.name: unknown estimator 'RandomPertubation'; did you mean "
            "'RandomPerturbation'?"
        ],
    ),
    "component without a name": (
        GOOD.replace("  name: Adam\n", ""),
        [
            "6:1: optimizer.name: missing; choose from SGD, Adam, AdamW, Adamax, NAdam, RAdam, "
            "Adafactor, Adadelta, Adagrad, ASGD, Muon, RMSprop, ..."
        ],
    ),
    "name that is a number": (
        GOOD.replace("name: Adam", "name: 3"),
        [
            "7:9: optimizer.name: must be text; choose from SGD, Adam, AdamW, Adamax, NAdam, "
            "RAdam, Adafactor, Adadelta, Adagrad, ASGD, Muon, RMSprop, ..."
        ],
    ),
    "malformed target": (
        GOOD.replace("RandomPerturbation", "my-package:Mine"),
        ["4:9: estimator.name: 'my-package:Mine' is not of the form package.module:attribute"],
    ),
    "target without the attribute": (
        GOOD.replace("RandomPerturbation", "fwdlearn.estimators:SPSSA"),
        [
            "4:9: estimator.name: fwdlearn.estimators:SPSSA: fwdlearn.estimators has no 'SPSSA'; "
            "did you mean 'SPSA'?"
        ],
    ),
    "target that is no estimator": (
        GOOD.replace("RandomPerturbation", "fractions:Fraction").replace("  sigma: 0.01\n", ""),
        [
            "4:9: estimator.name: fractions:Fraction is no estimator: it has no traits that "
            "say what it needs"
        ],
    ),
    "unknown argument": (
        GOOD.replace("sigma", "sgima"),
        ["5:3: estimator.sgima: unknown argument; did you mean 'sigma'?"],
    ),
    "argument that building gives": (
        GOOD.replace("lr: 1e-3", "params: [1]"),
        ["8:3: optimizer.params: given by fwdlearn; remove it"],
    ),
    "missing argument": (
        GOOD.replace("digits", "idx"),
        ["2:1: data.path: missing; add it to the file, or data.path=PATH on the command line"],
    ),
    "null for a required argument": (
        GOOD.replace("digits", "idx, path: null"),
        ["2:25: data.path: missing; add it to the file, or data.path=PATH on the command line"],
    ),
    "argument of the wrong type": (
        GOOD.replace("0.01", "tiny"),
        ["5:10: estimator.sigma: must be a number, got 'tiny'"],
    ),
    "item of the wrong type": (
        GOOD.replace("[8]", "[8, wide]"),
        ['1:28: model.hidden: must be a list, each an integer, got [8, "wide"]'],
    ),
    "value that the component refuses": (
        GOOD.replace("0.01", "-0.01"),
        ["5:10: estimator.sigma: RandomPerturbation(sigma=...) must be positive, got -0.01."],
    ),
    "value that torch refuses": (
        GOOD.replace("1e-3", "-1e-3"),
        ["8:7: optimizer.lr: Adam: Invalid learning rate: -0.001"],
    ),
    "unknown schedule": (
        GOOD.replace("1e-3", "1e-3\n  schedule: CosineAnealingLR"),
        [
            "9:13: optimizer.schedule.name: unknown schedule 'CosineAnealingLR'; did you mean "
            "'CosineAnnealingLR'?"
        ],
    ),
    "unknown sink": (
        GOOD + "tracking: {wandbb: true}\n",
        ["12:12: tracking.wandbb: unknown sink; did you mean 'wandb'?"],
    ),
    "sink's argument": (
        GOOD + "tracking: {wandb: {mode: onlin}}\n",
        [
            "12:26: tracking.wandb.mode: must be one of offline, online, got 'onlin'; did you mean "
            "'online'?"
        ],
    ),
    "many at once": (
        GOOD.replace("mlp", "mpl").replace("sigma", "sgima").replace("steps: 5", "stpes: 5"),
        [
            "1:15: model.name: unknown model 'mpl'; did you mean 'mlp'?",
            "5:3: estimator.sgima: unknown argument; did you mean 'sigma'?",
            "11:3: trainer.stpes: unknown key; did you mean 'steps'?",
        ],
    ),
    "many that need signatures": (
        GOOD.replace("0.01", "0").replace("1e-3", "x").replace("[8]", "8"),
        [
            "1:28: model.hidden: must be a list, each an integer, got 8",
            "5:10: estimator.sigma: RandomPerturbation(sigma=...) must be positive, got 0.0.",
            "8:7: optimizer.lr: must be a number, got 'x'",
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_lines(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, expected = CASES[case]
    Path("r.yaml").write_text(text, "utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml")
    assert str(caught.value).splitlines() == [f"r.yaml:{line}" for line in expected]


def test_good(tmp_path: Path) -> None:
    file = tmp_path / "good.yaml"
    file.write_text(GOOD, "utf-8")
    assert load_recipe(str(file)).trainer.steps == 5


def _error(tmp_path: Path, text: str, *overrides: str) -> FwdlearnError:
    file = tmp_path / "r.yaml"
    file.write_text(text, "utf-8")
    with pytest.raises(FwdlearnError) as caught:
        load_recipe(str(file), overrides)
    return caught.value


def test_a_missing_data_file_alone_exits_with_3(tmp_path: Path) -> None:
    text = GOOD.replace("{name: digits}", "{name: npz, path: /nowhere/x.npz}")
    error = _error(tmp_path, text)
    assert isinstance(error, MissingError)
    assert str(error).endswith(
        "r.yaml:2:25: data.path: there is no file or folder '/nowhere/x.npz'; correct the path, "
        "which is absolute"
    )


def test_a_missing_data_file_among_mistakes_exits_with_2(tmp_path: Path) -> None:
    text = GOOD.replace("{name: digits}", "{name: npz, path: /nowhere/x.npz}")
    error = _error(tmp_path, text.replace("0.01", "0"))
    assert error.exit_code == 2
    assert len(str(error).splitlines()) == 2


def test_a_module_that_is_not_installed_exits_with_3(tmp_path: Path) -> None:
    error = _error(tmp_path, GOOD.replace("RandomPerturbation", "nosuchpackage.est:Mine"))
    assert error.exit_code == 3
    assert "r.yaml:4:9: estimator.name: nosuchpackage.est:Mine: no module named" in str(error)


def test_needs_that_the_oracle_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy.py").write_text(
        "from dataclasses import dataclass\n"
        "from fwdlearn.estimator import Estimator, Traits\n"
        "from fwdlearn.oracle import ActivationOracle, LossOracle\n"
        "class HessianOracle(LossOracle):\n"
        "    def curvatures(self): ...\n"
        "HessianOracle._is_protocol = True\n"
        "@dataclass(frozen=True)\n"
        "class Needy(Estimator):\n"
        "    traits = Traits(HessianOracle, 'weights', 'gradient', 1)\n"
        "    def estimate(self, *args, **kwargs): ...\n"
        "    @classmethod\n"
        "    def examples(cls): return [cls()]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    text = GOOD.replace("RandomPerturbation", "needy:Needy").replace("  sigma: 0.01\n", "")
    assert str(_error(tmp_path, text)).endswith(
        "r.yaml:4:9: estimator.name: needy:Needy needs HessianOracle; StepOracle lacks "
        "curvatures. Choose an estimator that needs LossOracle alone (`fwdlearn ls` shows "
        "what each one needs)."
    )


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "quickstrt",
            "quickstrt: no file or shipped recipe of that name; did you mean 'quickstart'?",
        ),
        ("no/such.yaml", "no/such.yaml: no such file of that name; shipped recipes are "),
        (".", ".: is a folder, not a recipe; give a file"),
    ],
)
def test_no_such_recipe(recipe: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert str(caught.value).startswith(message)


def test_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_bytes(b"model: mlp\nseed: \xff\n")
    with pytest.raises(RecipeError, match=r"r.yaml:2:7: not UTF-8 text; save the file as UTF-8"):
        load_recipe(str(file))
