"""Certificates along a run and of a finished run, and the check of its step size.

The step size is checked before training and after 1, 2, 4, ... epochs (see `packsaddle.curvature.step_stability`).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packsaddle.comm.communicator import Channel
from packsaddle.comm.group import Solo, resolve
from packsaddle.comm.launch import launch, local_device, process_group
from packsaddle.comm.ledger import Ledger
from packsaddle.comm.simulation import FusedGroup
from packsaddle.curvature.certificate import Certificate, Verdict
from packsaddle.curvature.certify import certify
from packsaddle.curvature.hessian import Curvature, NotFiniteError
from packsaddle.curvature.iterates import draw_iterates
from packsaddle.curvature.step_stability import Step, largest_overshoot
from packsaddle.errors import ConfigError
from packsaddle.experiments.config import CertifyConfig, Config
from packsaddle.experiments.progress import Report, countdown
from packsaddle.experiments.run_folder import RunFolder, damaged, read_object
from packsaddle.experiments.schema import build
from packsaddle.experiments.tasks.images import Dataset, load_data
from packsaddle.experiments.tasks.models import Task, make_task
from packsaddle.experiments.tasks.sharding import Calendar
from packsaddle.numerics.seeds import Stream, generator
from packsaddle.optim.sgd import CompressedSGD

_BATCH = 500


@dataclass(frozen=True)
class Examples:
    """Chosen examples as batches that can be read again, on a device and in a precision."""

    data: Dataset
    index: Tensor  # int64
    device: torch.device
    dtype: torch.dtype = torch.float32
    batch_size: int = _BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part in torch.split(self.index, self.batch_size):
            if len(part):
                yield self.data.batch(part, self.device, self.dtype)


def task_loss(task: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean loss of a batch, for `certify`."""
    loss: Tensor = task(*batch)
    return loss


class Inspector:
    """One worker's part in the certificates of a run in progress; every method is collective."""

    def __init__(
        self, config: Config, task: Task, data: Dataset, shards: Sequence[Tensor], steps: int, per_epoch: int
    ) -> None:
        """`shards` has the shard of each worker that this process stands for (see `FusedGroup`)."""
        self._rule: CertifyConfig | None = config.certify
        self._lr = config.lr / (1 - config.momentum)
        self._task, self._seed, self._steps, self._per_epoch = task, config.seed, steps, per_epoch
        self._device = next(task.parameters()).device
        self.seconds = 0.0  # spent here
        self.examples = Examples(data, torch.cat(list(shards)), self._device)
        if self._rule is None:
            return
        # At random, since a shard may be sorted by class.
        chosen = [
            mine[self._order(len(mine), worker)[: self._rule.examples]]
            for worker, mine in enumerate(shards, start=resolve(None).rank)
        ]
        self.examples = Examples(data, torch.cat(chosen), self._device)
        self._population = len(data)
        self._due = certified_steps(self._rule, steps, per_epoch)
        self._iterates = set(draw_iterates(self._rule.iterates, steps, self._seed))

    def _order(self, n: int, worker: int) -> Tensor:
        return torch.randperm(n, generator=generator(self._seed, 0, Stream.CERTIFY, worker=worker))

    def look(self, step: int, folder: RunFolder) -> None:
        """Keep x_t if it was drawn, and certify it if it is due; t = `step`, before its gradient."""
        if self._rule is None:
            return
        begin = time.perf_counter()
        if step in self._iterates and resolve(None).rank == 0:
            folder.save_tensors(iterate_name(step), self._task.network.state_dict())
        if step in self._due:
            line = {"step": step, "epoch": step / self._per_epoch, **self._certify(self._rule, step)}
            if resolve(None).rank == 0:
                folder.append("certificates.jsonl", line)
        self.seconds += time.perf_counter() - begin

    def _certify(self, rule: CertifyConfig, step: int) -> dict[str, Any]:
        try:
            certificate = certify(
                self._task,
                task_loss,
                self.examples,
                epsilon=rule.last_epsilon if rule.last_epsilon and step == self._steps else rule.epsilon,
                hessian_lipschitz=rule.hessian_lipschitz,
                failure_probability=rule.failure_probability,
                max_hvps=rule.max_hvps,
                sample_of=self._population,
                lr=self._lr,
                generator=generator(self._seed, step, Stream.CERTIFY, device=self._device),
                process_group=Solo() if isinstance(resolve(None), FusedGroup) else None,
            )
        except NotFiniteError:  # a run that diverged goes on to its end and tells
            return {"verdict": str(Verdict.GRADIENT_TOO_LARGE), "loss": None}
        return certificate.to_dict()


def certified_steps(rule: CertifyConfig, steps: int, per_epoch: int) -> set[int]:
    """The steps of a run's certificates: every so many epochs, at chosen epochs within the run, and then at its end."""
    due = {round(epoch * per_epoch) for epoch in rule.at}
    if rule.every is not None:
        stride = max(1, round(rule.every * per_epoch))
        due |= set(range(stride, steps, stride))
    return {min(max(1, step), steps) for step in due} | ({steps} if due or rule.every is not None else set())


def iterate_name(step: int) -> str:
    """Where a run keeps the drawn iterate x_t."""
    return f"iterates/step-{step:08d}.pt"


def drawn_names(config: Config, steps: int) -> list[str]:
    """The files of the iterates that a run of T = `steps` draws, as often as they are drawn."""
    m = 0 if config.certify is None else config.certify.iterates
    return [iterate_name(step) for step in draw_iterates(m, steps, config.seed)]


_AUDIT_BATCH, _BATCH_OF_SAMPLE = 500, 64
_POINTS = 20  # of the profile, to each side


@dataclass(frozen=True)
class Profile:
    """The loss along the escape direction: f(x + s v)."""

    distances: tuple[float, ...]  # s
    losses: tuple[float | None, ...]  # None: not finite


@dataclass(frozen=True)
class Finding:
    """What was found at one point."""

    file: Path
    certificate: Certificate
    profile: Profile


@dataclass(frozen=True)
class Audit:
    """Certificates of weights of one run, each on the same examples."""

    run: Path
    files: tuple[Path, ...]  # weights, as `Training` saves them
    epsilon: float | None = None  # None: the least that each point's gradient passes
    hessian_lipschitz: float | None = None
    failure_probability: float = 1e-3
    max_hvps: int = 200
    tolerance: float = math.inf
    examples: int | None = None  # a random sample of so many in all; None: all training examples, or `at_most` of them
    at_most: int | None = None
    batch_size: int | None = None  # None: 500, and of a sample 64, so that a standard error has batches to come from
    double: bool = False  # products in float64
    distance: float | None = None  # of the profile to each side; None: as far as the certificate suggests
    data_dir: Path | None = None
    seed: int = 0  # of the sample and of the start
    quiet: bool = True  # else rank 0 shows progress on stderr

    def load(self) -> tuple[Task, Dataset, list[dict[str, Tensor]]]:
        """Return the run's network, its training examples and every file's weights, raising ConfigError for what is
        missing or does not fit."""
        config = read_config(self.run)
        data = load_data(config.data, self.data_dir, train=True)
        if self.examples is not None and not 1 <= self.examples <= len(data):
            raise ConfigError(f"examples must be from 1 to {len(data)}, the training examples, got {self.examples}")
        task = make_task(config.model, data.shape, data.classes, 0)
        weights = []
        for file in self.files:
            weights.append(_read_weights(file))
            try:
                task.network.load_state_dict(weights[-1])
            except (RuntimeError, TypeError, AttributeError) as error:
                reason = str(error).splitlines()[-1].strip()
                raise ConfigError(f"{file} does not hold the weights of this run's network: {reason}") from None
        return task, data, weights

    def execute(self, workers: int) -> list[Finding]:
        """Certify in this process, or with `workers` new ones."""
        if workers == 1:
            return self.certify()
        self.load()  # bad input is told before any worker starts
        findings: list[Finding] = launch(certify_in_process_group, (self,), workers)
        return findings

    def certify(self) -> list[Finding]:
        """Certify every file in the present group; collective."""
        task, data, weights = self.load()
        examples = self._examples(data)
        task.to(examples.device, examples.dtype)
        findings = []
        quiet = self.quiet or resolve(None).rank != 0
        with countdown("certify", len(self.files) * self.max_hvps, quiet=quiet) as progress:
            for i, (file, tensors) in enumerate(zip(self.files, weights, strict=True)):
                task.network.load_state_dict(tensors)
                told = partial(self._tell, progress, i)
                told(0)
                try:
                    certificate = self._certify(task, examples, len(data), told)
                except NotFiniteError as error:
                    raise ConfigError(f"{file}: {error}") from None
                findings.append(Finding(file, certificate, self._profile(task, examples, certificate)))
        return findings

    def _tell(self, progress: Report, point: int, products: int) -> None:
        """Show how far the certificates are; most need fewer products than they may take."""
        which = f"point {point + 1} of {len(self.files)}, " if len(self.files) > 1 else ""
        progress(point * self.max_hvps + products, f"{which}{products} of at most {self.max_hvps} products")

    def prepare(self) -> tuple[Task, Examples]:
        """Return the network with the last file's weights, and this worker's examples."""
        task, data, _ = self.load()
        examples = self._examples(data)
        return task.to(examples.device, examples.dtype), examples

    def _examples(self, data: Dataset) -> Examples:
        """This worker's part of the sample."""
        group, n = resolve(None), len(data)
        order = torch.randperm(n, generator=generator(self.seed, 0, Stream.CERTIFY))
        dtype = torch.float64 if self.double else torch.float32
        chosen = order[: self.examples or self.at_most]
        mine = chosen[group.rank :: group.size]
        batch_size = self.batch_size or (_AUDIT_BATCH if len(chosen) == n else _BATCH_OF_SAMPLE)
        return Examples(data, mine, local_device(), dtype, batch_size)

    def _certify(self, task: Task, examples: Examples, population: int, progress: Callable[[int], None]) -> Certificate:
        config = read_config(self.run)
        return certify(
            task,
            task_loss,
            examples,
            epsilon=self.epsilon,
            hessian_lipschitz=self.hessian_lipschitz,
            failure_probability=self.failure_probability,
            max_hvps=self.max_hvps,
            tolerance=self.tolerance,
            sample_of=population,
            lr=config.lr / (1 - config.momentum),
            generator=generator(self.seed, 1, Stream.CERTIFY, device=examples.device),
            progress=progress,
        )

    def _profile(self, task: Task, examples: Examples, certificate: Certificate) -> Profile:
        """The loss along v on a grid, to twice where a saddle's was found lowest, or to 1."""
        reach = self.distance or 2 * abs(certificate.escape_distance or 0.5)
        curvature = Curvature(task, task_loss, examples, Channel(resolve(None), Ledger()))
        distances = [reach * i / _POINTS for i in range(-_POINTS, _POINTS + 1)]
        losses = [curvature.loss_at(certificate.escape_direction, s) for s in distances]
        return Profile(tuple(distances), tuple(f if math.isfinite(f) else None for f in losses))


def certify_in_process_group(audit: Audit) -> list[Finding]:
    """`Audit.certify` in a process that a launcher started."""
    with process_group():
        return audit.certify()


def read_config(run: Path) -> Config:
    """Return the configuration that a run folder keeps. Raises ConfigError."""
    if not (run / "config.json").is_file():
        raise ConfigError(f"{run} is not a run folder (it has no config.json)")
    try:
        return build(Config, read_object(run / "config.json"))
    except ConfigError as error:
        raise damaged(run, ConfigError(f"config.json: {str(error).removeprefix('config.json: ')}")) from None


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"checkpoint {file} does not exist") from None
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"checkpoint {file} cannot be read: {reason}") from None
    return weights


_EXAMPLES = 256
_LONG = 5.0  # steps in the mean; who waits for less moves by few gradients at once


class Footing:
    """Looks where a coordinate waits long to be sent, at the examples of this process alone.

    The mean over workers would cost several dense exchanges.
    """

    def __init__(
        self, config: Config, task: Task, optimizer: CompressedSGD, data: Dataset, shards: Sequence[Tensor]
    ) -> None:
        """`shards` has the shard of each worker that this process stands for."""
        self._config, self._task = config, task
        waits = optimizer.waits() or []
        self._steps = [
            Step(name, config.lr / (1 - config.momentum), wait)
            for (name, p), wait in zip(task.named_parameters(), waits, strict=False)
            if p.requires_grad
        ]
        self._concerned = any(step.wait >= _LONG for step in self._steps)
        first = next(task.parameters())
        chosen = torch.cat([_spread(shard, max(1, _EXAMPLES // len(shards))) for shard in shards])
        self._examples = Examples(data, chosen, first.device, first.dtype)

    def due(self, step: int, calendar: Calendar) -> bool:
        """Whether to look before step `step`."""
        epochs, rest = divmod(step, calendar.per_epoch)
        return self._concerned and rest == 0 and epochs & (epochs - 1) == 0

    def warning(self, step: int) -> str | None:
        """Return what is to be said, if the step is past stability."""
        channel = Channel(Solo(), Ledger())
        dice = generator(self._config.seed, step, Stream.CERTIFY)
        try:
            worst = largest_overshoot(Curvature(self._task, task_loss, self._examples, channel), self._steps, dice)
        except NotFiniteError:
            return None  # the gradient tells
        return worst.advice() if worst.is_unstable else None


def _spread(shard: Tensor, n: int) -> Tensor:
    """Some indices from all over a shard, which may be sorted by class."""
    return shard[:: max(1, len(shard) // n)][:n]
