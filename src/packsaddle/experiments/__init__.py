"""Configured runs: configuration, training loop, run folder, certificates along a run, reports, reproductions.

Read `config` first, then `job` (a run, from its configuration to its folder) and `trainer` (the run on one worker).
`tasks` has data and networks, `report` reads finished runs, `reproduce` has the paper's figures and table.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packsaddle.experiments.certification import Audit, read_config
    from packsaddle.experiments.config import Config, DataConfig, ModelConfig
    from packsaddle.experiments.job import Job
    from packsaddle.experiments.run_folder import Run, RunFolder, read_runs
    from packsaddle.experiments.trackers import Tracker
    from packsaddle.experiments.trainer import Trainer

__all__ = [
    "Audit",
    "Config",
    "DataConfig",
    "Job",
    "ModelConfig",
    "Run",
    "RunFolder",
    "Tracker",
    "Trainer",
    "read_config",
    "read_runs",
]
_FILES = {
    "certification": "Audit read_config",
    "config": "Config DataConfig ModelConfig",
    "job": "Job",
    "run_folder": "Run RunFolder read_runs",
    "trackers": "Tracker",
    "trainer": "Trainer",
}
_HOMES = {name: file for file, names in _FILES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import a public name's file when the name is first asked for: the command line needs few of them at its start."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
