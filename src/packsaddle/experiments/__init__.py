"""Configured runs: configuration, training loop, run folder, certificates along a run, reports, reproductions.

Read `config` first, then `job` (a run, from its configuration to its folder) and `trainer` (the run on one worker).
`tasks` has data and networks, `report` reads finished runs, `reproduce` has the paper's figures and table.
"""
