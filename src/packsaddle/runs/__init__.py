"""Configured runs: configuration, training loop, run folder, certificates along a run, reports.

Start with `config`, then `job` (a run, from its configuration to its folder) and `trainer` (the run on one worker).
`tasks` contains data and networks; `report` makes tables and figures from run folders.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# The public names by file, imported on first use (PEP 562), so that the command line starts without the trainer.
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
__all__ = sorted(name for names in _FILES.values() for name in names.split())

if TYPE_CHECKING:
    from packsaddle.runs.certification import Audit as Audit
    from packsaddle.runs.certification import read_config as read_config
    from packsaddle.runs.config import AnyCompressor as AnyCompressor
    from packsaddle.runs.config import CertifyConfig as CertifyConfig
    from packsaddle.runs.config import Config as Config
    from packsaddle.runs.config import DataConfig as DataConfig
    from packsaddle.runs.config import EscapeConfig as EscapeConfig
    from packsaddle.runs.config import LocalConfig as LocalConfig
    from packsaddle.runs.config import ModelConfig as ModelConfig
    from packsaddle.runs.config import NoiseConfig as NoiseConfig
    from packsaddle.runs.config import configure as configure
    from packsaddle.runs.config import override as override
    from packsaddle.runs.folder_lock import check_free as check_free
    from packsaddle.runs.folder_lock import locked as locked
    from packsaddle.runs.job import How as How
    from packsaddle.runs.job import Job as Job
    from packsaddle.runs.job import fastest_simulation as fastest_simulation
    from packsaddle.runs.run_checkpoints import CheckpointPolicy as CheckpointPolicy
    from packsaddle.runs.run_checkpoints import LoadingError as LoadingError
    from packsaddle.runs.run_folder import Run as Run
    from packsaddle.runs.run_folder import RunFolder as RunFolder
    from packsaddle.runs.run_folder import commit as commit
    from packsaddle.runs.run_folder import environment as environment
    from packsaddle.runs.run_folder import make_new as make_new
    from packsaddle.runs.run_folder import read_runs as read_runs
    from packsaddle.runs.run_folder import written as written
    from packsaddle.runs.trackers import Tracker as Tracker


def __getattr__(name: str) -> Any:
    for file, names in _FILES.items():
        if name in names.split():
            return getattr(import_module(f"{__name__}.{file}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
