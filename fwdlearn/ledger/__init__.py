"""What makes a run survive: a record of every step, snapshots, and the way back from both.

A run is its recipe, its first weights and its records. `records` is the file of records,
`snapshots` the files of full states, `journal` what a trainer writes both with and comes back by.
"""
