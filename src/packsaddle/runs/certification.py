"""Certification of the saved weights of a run as a saddle or a second-order stationary point, and its options."""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from packsaddle.comm.communicator import Communicator
from packsaddle.comm.devices import local_device
from packsaddle.comm.group import resolve
from packsaddle.comm.launching import launch, process_group
from packsaddle.comm.ledger import Ledger
from packsaddle.comm.sharding import is_sharded
from packsaddle.curvature.certificate import Certificate, Verdict
from packsaddle.curvature.certify import certify
from packsaddle.curvature.hessian import LossFn, NotFiniteError, every_nth
from packsaddle.curvature.options import Search
from packsaddle.curvature.population import MOST_PRODUCTS, PopulationCertificate, certify_population, check_population
from packsaddle.curvature.search import Bounds
from packsaddle.curvature.sharded import derivatives
from packsaddle.curvature.spectral_density import SpectralDensity, spectral_density
from packsaddle.errors import ConfigError
from packsaddle.messages import first_line
from packsaddle.numerics.devices import device_of_doubles
from packsaddle.numerics.seeds import Stream, generator
from packsaddle.options.schema import build
from packsaddle.runs.config import Config
from packsaddle.runs.progress import Report, countdown
from packsaddle.runs.report import figures
from packsaddle.runs.report.certificate_figure import draw_certificate
from packsaddle.runs.run_folder import RunFolder, damaged, make_new, read_object, written
from packsaddle.runs.tasks.images import Dataset, load_data
from packsaddle.runs.tasks.models import Task, make_task, task_loss
from packsaddle.runs.tasks.sharding import Examples

_POINTS = 20  # number of points of a loss profile on each side of x
_PROFILED = 4096  # examples for a loss profile: its 41 losses over all examples would dominate the cost
_PROBES, _STEPS = 4, 40  # Lanczos probes of the spectral density, and products of each
_AUDIT_BATCH, _BATCH_OF_SAMPLE = 500, 64
_WORKERS_PER_CORE = 8  # most worker processes per core
_BATCHES_OF_POPULATION = 32  # fewest batches: the population's bounds come from the variance between batches


@dataclass(frozen=True)
class Profile:
    """The loss along a direction v: f(x + s v)."""

    distances: tuple[float, ...]  # distances s along v
    losses: tuple[float | None, ...]  # losses f(x + s v); None: non-finite
    examples: int  # number of examples in the mean loss


@dataclass(frozen=True)
class Finding:
    """The results of the certification of one point, a file of weights."""

    file: Path  # file of the weights
    certificate: Certificate
    profile: Profile  # loss along the escape direction
    sharpest: Profile | None  # loss along the sharpest direction; None if unknown
    spectrum: SpectralDensity | None
    population: PopulationCertificate | None
    sharded: bool  # True: the model is sharded, and directions are this worker's shards
    lr: float | None  # lr / (1 - momentum) of SGD, for escape times; None: unknown

    def to_dict(self) -> dict[str, Any]:
        return {
            "file": str(self.file),
            **self.certificate.to_dict(self.lr),
            "profile": asdict(self.profile),
            "sharpest_profile": None if self.sharpest is None else asdict(self.sharpest),
            "spectrum": None if self.spectrum is None else asdict(self.spectrum),
            "population": None if self.population is None else self.population.to_dict(),
        }

    def __str__(self) -> str:
        more = [str(part) for part in (self.population, self.spectrum) if part is not None]
        steps = None if self.lr is None else self.certificate.escape_steps(self.lr)
        if steps is not None and self.certificate.verdict is Verdict.SECOND_ORDER_STATIONARY:
            more.insert(0, f"  at lr {self.lr:.3g} SGD's distance along v grows tenfold in about {steps:,.0f} steps")
        return "\n".join([f"{self.file}: {self.certificate}", *more])


@dataclass(frozen=True)
class Questions:
    """Options for certifying a point."""

    epsilon: float | None = None  # threshold of the gradient norm; None: no verdict on stationarity
    hessian_lipschitz: float | None = None  # rho, the Hessian's Lipschitz constant; None: measured
    search: Search = Search()  # noqa: RUF009 -- immutable
    spectrum: bool = False  # estimate the density of all eigenvalues
    population: bool = False  # certify the loss of the population from which the examples are drawn
    distance: float | None = None  # length of the profiles to each side; None: twice the escape distance, else 1
    lr: float | None = None  # lr / (1 - momentum) of SGD, for escape times; None: unknown
    seed: int = 0  # seed of the random start vectors
    quiet: bool = True  # False: rank 0 shows progress on stderr

    def certify(
        self, model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], progress: Report, sample_of: int | None = None
    ) -> Certificate:
        """Certify the model's parameters; collective. `progress` gets the number of products, at most `max_hvps`."""
        most = self.search.max_hvps
        progress(0, f"0 of at most {most} products")

        def tell(b: Bounds) -> None:
            progress(round(most * b.products / b.most), f"{b.products} of at most {b.most} products: {b}")

        search = self._started(1)
        return certify(model, loss_fn, batches, **self._goal, search=search, sample_of=sample_of, progress=tell)

    def finding(
        self, file: Path, model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], certificate: Certificate
    ) -> Finding:
        """Return all results at a certified point: loss profiles, optional spectrum and population; collective."""
        # Evaluate the loss along the escape and the sharpest direction.
        v, w = certificate.escape_direction, certificate.sharpest_direction
        every = every_nth(batches, max(1, certificate.examples // _PROFILED))
        reach = self.distance or 2 * abs(certificate.escape_distance or 0.5)
        escape = _profile(model, loss_fn, every, v, reach)
        sharpest = None if w is None else _profile(model, loss_fn, every, w, reach)

        # Estimate the density of all eigenvalues, and certify the population loss.
        spectrum = population = None
        if self.spectrum:
            with self._counting("spectral density", _PROBES * _STEPS) as progress:
                limits = {"probes": _PROBES, "steps": _STEPS}
                search = self._started(2)
                spectrum = spectral_density(model, loss_fn, batches, **limits, search=search, progress=progress)
        if self.population:
            with self._counting("population", MOST_PRODUCTS) as progress:
                goal, search = self._goal, self._started(3)
                population = certify_population(model, loss_fn, batches, **goal, search=search, progress=progress)
        return Finding(file, certificate, escape, sharpest, spectrum, population, is_sharded(model), self.lr)

    def countdown(self, what: str, most: int) -> AbstractContextManager[Report]:
        """Context manager that shows progress through at most `most` products, on rank 0 unless `quiet`."""
        return countdown(what, most, quiet=self.quiet or resolve(None).rank != 0)

    @property
    def _goal(self) -> dict[str, float | None]:
        return {"epsilon": self.epsilon, "hessian_lipschitz": self.hessian_lipschitz}

    def _started(self, step: int) -> Search:
        return replace(self.search, generator=generator(self.seed, step, Stream.CERTIFY))

    @contextmanager
    def _counting(self, what: str, most: int) -> Iterator[Callable[[int], None]]:
        """Context manager that shows progress; yields a function to call with the number of products so far."""
        with self.countdown(what, most) as progress:
            yield lambda products: progress(products, f"{products} of at most {most} products")


def _profile(model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], direction: Tensor, reach: float) -> Profile:
    curvature = derivatives(model, loss_fn, batches, Communicator(resolve(None), Ledger()))
    direction = direction.to(curvature.device)
    distances = [reach * i / _POINTS for i in range(-_POINTS, _POINTS + 1)]
    losses = [curvature.loss_at(direction, s) for s in distances]
    finite = tuple(loss if math.isfinite(loss) else None for loss in losses)
    return Profile(tuple(distances), finite, curvature.examples)


@dataclass(frozen=True)
class Audit:
    """Certification of weights of one run, all on the same examples."""

    run: Path
    files: tuple[Path, ...]  # files of weights, as saved by `Trainer`
    questions: Questions = Questions()
    examples: int | None = None  # size of the random sample (by `questions.seed`); None: all, or `at_most` of them
    at_most: int | None = None  # maximum number of examples, if `examples` is None; None: no limit
    batch_size: int | None = None  # None: 500 for all examples, 64 for a sample: a standard error needs many batches
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
        """Certify the weights in every file, in `workers` new processes if above 1, and return one finding per file.
        Raises ConfigError for more workers than examples, or more than 8 per core."""
        if workers == 1:
            return self.certify()
        _, data, _ = self.load()  # raises for invalid input before any worker starts
        examples = self.examples or min(self.at_most or len(data), len(data))
        for most, of in ((examples, "examples"), (_WORKERS_PER_CORE * (os.cpu_count() or 1), "cores")):
            if workers > most:
                raise ConfigError(f"--workers must be at most {most} for the number of {of}, got {workers}")
        findings: list[Finding] = launch(certify_in_process_group, (self,), workers)
        return findings

    def certify(self) -> list[Finding]:
        """Certify the weights in every file, and return a finding for each; collective over the process group."""
        task, data, weights = self.load()
        examples = self._examples(data)
        task.to(examples.device, examples.dtype)
        if self.questions.population:
            try:
                check_population(task, examples)
            except ValueError as error:
                raise ConfigError(f"{error}; --batch-size makes them smaller") from None

        # Certify all files, with one countdown; then compute profiles, spectra and populations.
        certificates = []
        most = self.questions.search.max_hvps
        with self.questions.countdown("certify", len(self.files) * most) as progress:
            for i, (file, tensors) in enumerate(zip(self.files, weights, strict=True)):
                task.network.load_state_dict(tensors)
                which = f"point {i + 1} of {len(self.files)}, " if len(self.files) > 1 else ""

                def report(step: int, text: str, before: int = i * most, which: str = which) -> None:
                    progress(before + step, f"{which}{text}")

                try:
                    certificates.append(self.questions.certify(task, task_loss, examples, report, len(data)))
                except NotFiniteError as error:
                    raise ConfigError(f"{file}: {error}") from None
        findings = []
        for file, tensors, certificate in zip(self.files, weights, certificates, strict=True):
            task.network.load_state_dict(tensors)
            findings.append(self.questions.finding(file, task, task_loss, examples, certificate))
        return findings

    def prepare(self) -> tuple[Task, Examples]:
        task, data, _ = self.load()
        examples = self._examples(data)
        return task.to(examples.device, examples.dtype), examples

    def _examples(self, data: Dataset) -> Examples:
        """Return this worker's part of the chosen examples, in batches."""
        group, n = resolve(None), len(data)
        order = torch.randperm(n, generator=generator(self.questions.seed, 0, Stream.CERTIFY))
        dtype = torch.float64 if self.double else torch.float32
        chosen = order[: self.examples or self.at_most]
        mine = chosen[group.rank :: group.size]
        batch_size = self.batch_size or (_AUDIT_BATCH if len(chosen) == n else _BATCH_OF_SAMPLE)
        if self.questions.population and self.batch_size is None:
            batch_size = max(1, min(batch_size, len(chosen) // _BATCHES_OF_POPULATION))
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


def read_weights(file: Path) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # warnings about the format; an error mentions it too
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"checkpoint {file} does not exist") from None
    except Exception as error:  # a damaged file can raise anything
        raise ConfigError(f"checkpoint {file} cannot be read: {first_line(error)}") from None


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Context manager that creates a folder, and removes it if the block fails. Raises ConfigError."""
    make_new(folder)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            folder.rmdir()
        raise


def write(findings: Sequence[Finding], document: dict[str, Any], folder: Path) -> None:
    """Write certificates.json (`document`), and the directions and plot of every point. Raises ConfigError.
    Directions of a sharded model are not written, since each worker has only its shard of them."""
    writer = RunFolder(folder)
    with written(folder):
        writer.write_json("certificates.json", document)
        for finding, point in zip(findings, document["points"], strict=True):
            name = "certificate" if len(findings) == 1 else finding.file.stem
            directions = {"escape_direction": finding.certificate.escape_direction}
            if finding.certificate.sharpest_direction is not None:
                directions["sharpest_direction"] = finding.certificate.sharpest_direction
            if not finding.sharded:
                writer.save_tensors(f"{name}.direction.pt", directions)
            figures.save(draw_certificate(point), folder, name)
