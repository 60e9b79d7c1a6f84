"""Configured runs: configuration, training loop, run folder, certificates along a run, reports.

Read `config` first, then `job` (a run, from its configuration to its folder) and `trainer` (the run on one worker).
`tasks` contains data and networks; `report` makes tables and figures from run folders.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packsaddle.runs.certification import Audit, read_config
    from packsaddle.runs.config import (
        AnyCompressor,
        CertifyConfig,
        Config,
        DataConfig,
        EscapeConfig,
        LocalConfig,
        ModelConfig,
        NoiseConfig,
        configure,
        override,
    )
    from packsaddle.runs.folder_lock import check_free, locked
    from packsaddle.runs.job import How, Job, fastest_simulation
    from packsaddle.runs.run_checkpoints import CheckpointPolicy, LoadingError
    from packsaddle.runs.run_folder import Run, RunFolder, commit, environment, make_new, read_runs, written
    from packsaddle.runs.trackers import Tracker

__all__ = [
    "AnyCompressor",
    "Audit",
    "CertifyConfig",
    "CheckpointPolicy",
    "Config",
    "DataConfig",
    "EscapeConfig",
    "How",
    "Job",
    "LoadingError",
    "LocalConfig",
    "ModelConfig",
    "NoiseConfig",
    "Run",
    "RunFolder",
    "Tracker",
    "check_free",
    "commit",
    "configure",
    "environment",
    "fastest_simulation",
    "locked",
    "make_new",
    "override",
    "read_config",
    "read_runs",
    "written",
]
_FILES = {
    "certification": "Audit read_config",
    "config": "AnyCompressor CertifyConfig Config DataConfig EscapeConfig LocalConfig ModelConfig NoiseConfig "
    "configure override",
    "folder_lock": "check_free locked",
    "job": "How Job fastest_simulation",
    "run_checkpoints": "CheckpointPolicy LoadingError",
    "run_folder": "Run RunFolder commit environment make_new read_runs written",
    "trackers": "Tracker",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562), so that the command line starts without importing the trainer."""
    for file, names in _FILES.items():
        if name in names.split():
            return getattr(import_module(f"{__name__}.{file}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
