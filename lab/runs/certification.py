"""Certification of the saved weights of a run as a saddle or a second-order stationary point."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lab.runs.config import Config
from lab.runs.run_folder import damaged, read_object
from lab.tasks.images import Dataset, load_data
from lab.tasks.models import Task, make_task, task_loss
from lab.tasks.sharding import Examples
from packsaddle.cli.findings import Finding, Questions, read_weights
from packsaddle.comm.group import resolve
from packsaddle.comm.launching import launch, local_device, process_group
from packsaddle.curvature.hessian import NotFiniteError
from packsaddle.errors import ConfigError
from packsaddle.numerics.devices import device_of_doubles
from packsaddle.numerics.seeds import Stream, generator
from packsaddle.options.schema import build

_AUDIT_BATCH, _BATCH_OF_SAMPLE = 500, 64


@dataclass(frozen=True)
class Audit:
    """Certification of one or more weights of one run, all on the same examples."""

    run: Path
    files: tuple[Path, ...]  # files of weights, as `Trainer` saves them
    questions: Questions = Questions()  # noqa: RUF009 -- immutable
    # Size of the random sample of examples, drawn with `questions.seed`. None: all examples, up to `at_most`.
    examples: int | None = None
    at_most: int | None = None  # maximum number of examples, if `examples` is None; None: no limit
    # None: 500 for all examples. For a sample it is 64, since its standard error must be estimated from many batches.
    batch_size: int | None = None
    double: bool = False  # True: compute in float64
    data_dir: Path | None = None

    def load(self) -> tuple[Task, Dataset, list[dict[str, Tensor]]]:
        """Return the run's network, its training examples and the weights in every file. Raises ConfigError."""
        config = read_config(self.run)
        data = load_data(config.data, self.data_dir, train=True)
        if self.examples is not None and not 1 <= self.examples <= len(data):
            raise ConfigError(f"examples must be from 1 to {len(data)}, the training examples, got {self.examples}")
        task = make_task(config.model, data.shape, data.classes, 0)
        weights = []
        for file in self.files:
            weights.append(read_weights(file))
            try:
                task.network.load_state_dict(weights[-1])
            except (RuntimeError, TypeError, AttributeError) as error:
                reason = str(error).splitlines()[-1].strip()
                raise ConfigError(f"{file} does not hold the weights of this run's network: {reason}") from None
        return task, data, weights

    def execute(self, workers: int) -> list[Finding]:
        """Certify the weights in every file, and return one finding per file.

        If `workers` is above 1, that number of processes is started.
        """
        if workers == 1:
            return self.certify()
        self.load()  # raises ConfigError for invalid input, before any worker starts
        findings: list[Finding] = launch(certify_in_process_group, (self,), workers)
        return findings

    def certify(self) -> list[Finding]:
        """Certify the weights in every file, and return a finding for each; collective over the process group."""
        task, data, weights = self.load()
        examples = self._examples(data)
        task.to(examples.device, examples.dtype)

        # Certify all files, with one progress display.
        findings = []
        most = self.questions.search.max_hvps
        with self.questions.countdown(len(self.files)) as progress:
            for i, (file, tensors) in enumerate(zip(self.files, weights, strict=True)):
                task.network.load_state_dict(tensors)
                which = f"point {i + 1} of {len(self.files)}, " if len(self.files) > 1 else ""

                def report(step: int, text: str, before: int = i * most, which: str = which) -> None:
                    progress(before + step, f"{which}{text}")

                try:
                    findings.append(self.questions.finding(file, task, task_loss, examples, report, len(data)))
                except NotFiniteError as error:
                    raise ConfigError(f"{file}: {error}") from None
        return findings

    def _examples(self, data: Dataset) -> Examples:
        """Return this worker's part of the examples on which weights are certified, in batches."""
        group, n = resolve(None), len(data)
        order = torch.randperm(n, generator=generator(self.questions.seed, 0, Stream.CERTIFY))
        dtype = torch.float64 if self.double else torch.float32
        chosen = order[: self.examples or self.at_most]
        mine = chosen[group.rank :: group.size]
        batch_size = self.batch_size or (_AUDIT_BATCH if len(chosen) == n else _BATCH_OF_SAMPLE)
        return Examples(data, mine, device_of_doubles(local_device()), dtype, batch_size)


def certify_in_process_group(audit: Audit) -> list[Finding]:
    with process_group():
        return audit.certify()


def read_config(run: Path) -> Config:
    if not (run / "config.json").is_file():
        raise ConfigError(f"{run} is not a run folder (it has no config.json)")
    try:
        return build(Config, read_object(run / "config.json"))
    except ConfigError as error:
        raise damaged(run, ConfigError(f"config.json: {str(error).removeprefix('config.json: ')}")) from None
