"""Configured runs: configuration, training loop, run folder, certificates along a run, reports.

Start with `config`, then `job` (a run, from its configuration to its folder) and `trainer` (the run on one worker).
`tasks` contains data and networks; `report` makes tables and figures from run folders.
"""

from lab.runs.certification import Audit, read_config
from lab.runs.config import (
    AnyCompressor,
    CertifyConfig,
    Config,
    EscapeConfig,
    LocalConfig,
    NoiseConfig,
    configure,
    override,
)
from lab.runs.folder_lock import check_free, locked
from lab.runs.job import How, Job, fastest_simulation
from lab.runs.run_checkpoints import CheckpointPolicy, LoadingError
from lab.runs.run_folder import Run, RunFolder, environment, read_runs
from packsaddle.cli.folders import make_new, written

__all__ = [
    "AnyCompressor",
    "Audit",
    "CertifyConfig",
    "CheckpointPolicy",
    "Config",
    "EscapeConfig",
    "How",
    "Job",
    "LoadingError",
    "LocalConfig",
    "NoiseConfig",
    "Run",
    "RunFolder",
    "check_free",
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
