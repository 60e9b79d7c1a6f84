"""The configuration of a run: typed, frozen, read from TOML, and saved with all defaults in every run folder.

The comments on fields are written into the file of `python -m lab init` (see `templates`).
"""

import inspect
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from lab.tasks.options import DataConfig, ModelConfig
from packsaddle.compressors import Compressor, Identity
from packsaddle.compressors.registry import CLASSES
from packsaddle.curvature.options import Search
from packsaddle.errors import ConfigError, check_counts, check_momentum, check_not_negative, check_positive, read_text
from packsaddle.feedback.compression import Compression
from packsaddle.feedback.escape import EscapeRule
from packsaddle.local.options import LocalOptions, OuterSGD, Overlap
from packsaddle.local.updates import LocalUpdates
from packsaddle.messages import shortened, shown
from packsaddle.options.schema import build

# The type of a compressor in a configuration: a union of the classes that `kind` may name. Type checkers, which cannot
# evaluate this union, use the base class of these classes.
if TYPE_CHECKING:
    AnyCompressor = Compressor
else:
    AnyCompressor = reduce(or_, CLASSES.values())
_LOCAL_COMPRESSOR = inspect.signature(LocalUpdates).parameters["compressor"].default


@dataclass(frozen=True)
class NoiseConfig:
    """Artificial noise xi_t in each step t, Gaussian with standard deviation r in each coordinate."""

    # standard deviation r; 0: no noise. python -m lab run suggests a value at its end, and warns if r is too large.
    # With [local], r is in the units of x and one xi is added per round
    std: float = 0.0
    lower_from: float | None = None  # epoch from which r falls linearly; by default never
    lower_until: float | None = None  # epoch at which r reaches zero; by default the end of the run

    def __post_init__(self) -> None:
        check_not_negative(std=self.std, lower_from=self.lower_from, lower_until=self.lower_until)
        start, stop = self.lower_from, self.lower_until
        if stop is not None and (start is None or start > stop):
            raise ValueError(
                f"lower_until needs a lower_from that is not above it, got lower_from = {start} and {stop}"
            )


@dataclass(frozen=True)
class EscapeConfig(EscapeRule):
    """The escape check of Algorithm 1."""

    examples: int = 1024  # examples per worker on which the loss is evaluated

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(examples=self.examples)


@dataclass(frozen=True, kw_only=True)
class CertifyConfig(Search):
    """Certificates along the run (see `packsaddle.certify`), and iterates saved for certification afterwards.
    The default of `max_hvps` is below that of `Search`, since a certificate along the run interrupts it."""

    epsilon: float  # target: gradient norm at most epsilon, smallest eigenvalue at least -sqrt(rho epsilon)
    hessian_lipschitz: float | None = None  # rho; by default measured along the escape direction
    every: float | None = None  # epochs between certificates; by default none along the run
    at: tuple[float, ...] = ()  # epochs at which a certificate is computed in addition to `every`
    last_epsilon: float | None = None  # epsilon of the certificate at the end; by default epsilon
    iterates: int = 0  # iterates drawn uniformly from x_0 ... x_T and saved, for python -m lab certify --iterates
    examples: int = 1024  # examples per worker, along the run
    max_hvps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(examples=self.examples)
        check_positive(epsilon=self.epsilon, last_epsilon=self.last_epsilon, hessian_lipschitz=self.hessian_lipschitz)
        check_positive(every=self.every)
        check_not_negative(iterates=self.iterates)
        if any(not 0 < epoch < math.inf for epoch in self.at):
            raise ValueError(f"at must be epochs above 0, got {list(self.at)}")


@dataclass(frozen=True)
class LocalConfig:
    """Local updates: workers step separately and exchange their changes (see `packsaddle.LocalUpdates`).
    A fragment is a set of parameters exchanged together; a round is one exchange of a fragment."""

    # the optimizer of each worker; uses lr and weight_decay, and for sgd and muon momentum and nesterov; muon: Muon for
    # matrices of hidden layers, AdamW for the rest
    optimizer: Literal["sgd", "adamw", "muon"]
    every: int = 8  # H, steps between two exchanges
    betas: tuple[float, ...] = (0.9, 0.999)  # AdamW's betas
    warm_up: float = 0.0  # epochs in which lr rises linearly at the start
    schedule: Literal["constant", "cosine"] = "constant"  # lr after the warm-up; cosine: down to a tenth at the end
    clip: float | None = None  # maximum gradient norm; larger gradients are scaled down; by default no limit
    keep_unsent: bool = True  # after a round, start from the anchor minus the worker's error memory; false: the anchor
    # after a round, the fraction of AdamW's first moments that is replaced by the direction of the mean update; by
    # default 0.5 with adamw and no outer momentum, else 0
    mean_momentum: float | None = None
    overlap: Overlap = field(default_factory=Overlap)
    outer: OuterSGD | None = None

    def __post_init__(self) -> None:
        check_positive(clip=self.clip)
        check_not_negative(warm_up=self.warm_up)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {list(self.betas)}")
        if self.optimizer == "sgd" and self.betas != (0.9, 0.999):
            raise ValueError(f"betas are only for adamw and muon, not sgd, got {list(self.betas)}")
        LocalOptions(Compression(Identity()), **self.arguments())

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `LocalUpdates` that are keys of this table, by name, without those that are None."""
        given = {f.name: getattr(self, f.name, None) for f in fields(LocalOptions)}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Config(Compression):
    """The configuration of one run. The options of `Compression` are top-level keys."""

    data: DataConfig
    model: ModelConfig
    lr: float  # eta, the step size
    epochs: float  # passes of all workers together over the data
    batch_size: int  # examples per worker and step
    # the compressor of each worker's vector in a step; `packsaddle compressors` compares the kinds. Without this table
    # it is Identity (uncompressed), and with [local] the default of `packsaddle.LocalUpdates`, one bit per coordinate
    compressor: AnyCompressor = field(default=cast(Any, None))
    # the compressor of the mean sent back to the workers, in the two-way and coordinator exchanges
    back: AnyCompressor | None = None
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    escape: EscapeConfig | None = None
    certify: CertifyConfig | None = None
    local: LocalConfig | None = None
    label: str = ""  # name in tables and figures; by default the folder's
    weight_decay: float = 0.0  # times x is added to the gradient before compression (L2); decoupled in adamw and muon
    # applied to each worker's gradients before compression; by default 0, or for local.optimizer = "muon" 0.95 with
    # nesterov
    momentum: float | None = None
    nesterov: bool = False  # Nesterov momentum
    precision: Literal["float32", "float64", "bfloat16"] = "float32"  # bfloat16: autocast of the forward pass only
    # maximum number of consecutive steps (with [local]: of rounds) skipped because of non-finite gradients
    max_skipped: int = 20
    monitor_every: int = field(default=0, init=False)  # replaced by log_every
    seed: int = 0  # seed of all random numbers
    workers: int = 1  # W; overridden by --workers
    log_every: int = 100  # steps averaged in one line of metrics
    test_every: float | None = None  # epochs between tests along the run; by default only at its end
    plateau: float | None = None  # loss level of a plateau; with it, tables show the epochs spent there

    def __post_init__(self) -> None:
        if self.compressor is None:
            object.__setattr__(self, "compressor", Identity() if self.local is None else _LOCAL_COMPRESSOR)
        check_counts(batch_size=self.batch_size, workers=self.workers, log_every=self.log_every)
        check_positive(epochs=self.epochs, test_every=self.test_every, plateau=self.plateau)
        check_not_negative(lr=self.lr, weight_decay=self.weight_decay)
        super().__post_init__()
        check_momentum(*self.effective_momentum())

        # Construct the option classes, which raise errors for options that CompressedSGD or local updates do not
        # support.
        local = self.local
        if local is None:
            self.compression().for_sgd()
            return
        LocalOptions(self.compression(), **local.arguments())

        # With local updates, lr, momentum and nesterov are options of local.optimizer, with which each worker steps.
        if self.momentum and local.optimizer == "adamw":
            raise ValueError('momentum is only for local.optimizer = "sgd" and "muon"; for adamw set local.betas')
        if local.warm_up >= self.epochs:
            raise ValueError(f"local.warm_up must be less than epochs = {self.epochs:g}, got {local.warm_up:g}")
        if self.escape is not None and (local.overlap.fragments > 1 or local.overlap.delay):
            raise ValueError("escape needs local.overlap.fragments = 1 and delay = 0: it compares whole anchors")

    def compression(self) -> Compression:
        values = {f.name: getattr(self, f.name) for f in fields(Compression)}
        return Compression(**values | {"monitor_every": self.log_every})

    def effective_momentum(self) -> tuple[float, bool]:
        """Return the momentum, and True if it is Nesterov momentum; by default those of the optimizer."""
        if self.momentum is None and self.local is not None and self.local.optimizer == "muon":
            return 0.95, True
        return self.momentum or 0.0, self.nesterov

    def sgd_lr(self) -> float | None:
        """Return the equivalent step size lr / (1 - momentum) of plain SGD; None for other optimizers."""
        if self.local is not None and (self.local.optimizer != "sgd" or self.local.outer is not None):
            return None
        return self.lr / (1 - self.effective_momentum()[0])


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration from a TOML file, with `key=value` overrides by dotted key. Raises ConfigError."""
    text = read_text(path, f"config file {path}")
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    return configure(data, overrides, str(path))


def configure(data: dict[str, Any], overrides: Sequence[str], source: str = "the configuration") -> Config:
    """Build a Config from nested dictionaries, after applying overrides such as "data.limit=100" to them in place.

    Raises ConfigError, which names the `source` of the dictionaries, such as a file, and the overrides.
    """
    for text in overrides:
        override(data, text)
    try:
        return build(Config, data)
    except ConfigError as error:
        changes = f" with --set {shortened(' '.join(overrides))}" if overrides else ""
        raise ConfigError(f"{source}{changes}: {error}") from None


def first_difference(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], where: str = ""
) -> tuple[str, Any, Any] | None:
    """Compare two configurations as nested dictionaries, and find the first key whose values differ.

    Returns the dotted key, its value in `ours`, and its value in `theirs`; None if all values are equal. The key
    "workers" of the outermost dictionary is ignored. `where` is put before the key.
    """
    for key in dict.fromkeys([*ours, *theirs]):
        a, b = ours.get(key), theirs.get(key)
        if a == b or (where + key) == "workers":
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            return first_difference(a, b, f"{where}{key}.")
        return where + key, a, b
    return None


def override(data: dict[str, Any], assignment: str) -> tuple[str, ...]:
    """Apply one override `key=value`, with a dotted key, to nested dictionaries in place, and return the key.

    `key=` removes the key. Raises ConfigError for an invalid override.
    """
    name, equals, text = assignment.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set needs key=value, got {shown(assignment)}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # text that is not a TOML value is a string
    except (ValueError, RecursionError):
        raise ConfigError(f"--set {shortened(assignment)}: too many digits, or too deeply nested brackets") from None

    # Create missing tables.
    *path, last = key = tuple(name.strip().split("."))
    for part in path:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise ConfigError(f"--set {shortened(assignment)}: {shortened(part)} is not a table")
    if text.strip():
        data[last] = value
    else:
        data.pop(last, None)
    return key
