"""Estimators side by side: the same model, data, seeds and budget of queries for each.

`methods.plan` makes a recipe of every method, `runs.carry_out` trains each in a process of its own,
`results.summarise` puts the figures together, `report` and `plot` show them.
"""
