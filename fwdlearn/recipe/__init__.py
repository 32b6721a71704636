"""Recipes: one YAML file that says everything about a run.

`load.load_recipe` checks one, `build.build` makes a Trainer of it, `run.train` carries it out in a
folder, `evaluate.evaluate` measures what came out.
"""
