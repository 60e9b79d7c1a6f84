"""The configuration of a run: typed, frozen, read from TOML, and saved resolved with every run.

The comment on a field is what `packsaddle init` says of its key (see `templates`).
"""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from packsaddle.comm.select_aggregator import Exchange
from packsaddle.compressors import (
    QSGD,
    AdaptiveTopK,
    Identity,
    LinearSketch,
    LowRank,
    RandomK,
    SharedTopK,
    Sign,
    SketchTopK,
    TopK,
)
from packsaddle.curvature.options import Search
from packsaddle.errors import ConfigError, check_not_negative, check_positive
from packsaddle.feedback.compression import Compression
from packsaddle.feedback.escape import EscapeRule
from packsaddle.local.options import LocalOptions, OuterSGD, Overlap
from packsaddle.messages import shortened, shown
from packsaddle.options.schema import build, is_too_deep, line_of, syntax_error
from packsaddle.sgd.gradient import Storm

_EPOCHS = (1e-9, 1e9)  # the least and the most that a number of epochs may be
_WIDEST = 2**20  # units of a layer

AnyCompressor = (
    Identity | RandomK | TopK | AdaptiveTopK | SharedTopK | SketchTopK | Sign | QSGD | LinearSketch | LowRank
)


@dataclass(frozen=True)
class DataConfig:
    """The training examples, and their distribution to the workers."""

    name: Literal["digits", "mnist", "cifar10", "folder", "text"]  # folder: train/CLASS/* and test/CLASS/* images
    # class: worker i gets the classes c with c mod W = i; of text, the i-th of W stretches
    shard: Literal["iid", "class"] = "iid"
    limit: int | None = None  # use only this many training examples; by default all
    context: int = 64  # of text: characters of a window, which is an example

    def __post_init__(self) -> None:
        check_positive(limit=self.limit, context=self.context)
        if self.name != "text" and self.context != 64:
            raise ValueError(f"context is an option of text, and {self.name} has none")


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    # mnist-autoencoder: the paper's; autoencoder: of the widths below
    name: Literal["mnist-autoencoder", "autoencoder", "resnet18", "resnet34", "char-transformer"]
    widths: tuple[int, ...] = ()  # autoencoder: the encoder's layers after the input; the decoder mirrors them
    output: Literal["sigmoid", "linear"] = "sigmoid"  # autoencoders: the last activation
    width: int = 64  # resnet: channels of the first stage; char-transformer: numbers per character between the layers
    stem: Literal["small", "imagenet"] = "small"  # resnet: 3 x 3 convolution, or 7 x 7 with stride 2 and max pooling
    norm: Literal["worker", "all", "group"] = "worker"  # resnet: batch norm by worker or over all, or group norm
    depth: int = 2  # char-transformer: blocks
    heads: int = 2  # char-transformer: attention heads, of width / heads numbers each

    def __post_init__(self) -> None:
        if self.width < 4:
            raise ValueError(f"width must be at least 4, got {self.width}")
        _at_most(self, width=_WIDEST, depth=1000)
        resnet, text = "resnet" in self.name, self.name == "char-transformer"
        self._refuse("of a resnet", resnet, stem="small", norm="worker")
        self._refuse("of a resnet or the char-transformer", resnet or text, width=64)
        self._refuse("of the char-transformer", text, depth=2, heads=2)
        self._refuse("of an autoencoder", "autoencoder" in self.name, output="sigmoid")
        if (self.name == "autoencoder") != bool(self.widths):
            raise ValueError(f"widths are for the autoencoder, and it needs them, got {list(self.widths)}")
        if any(not 1 <= w <= _WIDEST for w in self.widths):
            raise ValueError(f"widths must be from 1 to {_WIDEST:,}, got {list(self.widths)}")
        check_positive(depth=self.depth, heads=self.heads)
        if text and self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")

    def _refuse(self, whose: str, applies: bool, **defaults: object) -> None:
        for name, default in defaults.items():
            if not applies and getattr(self, name) != default:
                raise ValueError(f"{name} is an option {whose}, and {self.name} has none")


@dataclass(frozen=True)
class NoiseConfig:
    """Artificial noise: r is the standard deviation of each coordinate of xi_t."""

    # r; 0: no noise. packsaddle run says at its end which r would suit, and warns of too much. With [local] it is in
    # the units of x, and there is one xi in each round
    std: float = 0.0
    lower_from: float | None = None  # in epochs: from here r falls linearly ...; by default never
    lower_until: float | None = None  # ... to zero here, in epochs; by default at the end of the run

    def __post_init__(self) -> None:
        check_not_negative(std=self.std, lower_from=self.lower_from, lower_until=self.lower_until)
        start, stop = self.lower_from, self.lower_until
        if max(start or 0, stop or 0) > _EPOCHS[1]:
            raise ValueError(f"lower_from and lower_until must be at most {_EPOCHS[1]:g}, got {start} and {stop}")
        if stop is not None and (start is None or start > stop):
            raise ValueError(f"lower_until needs a lower_from that is not after it, got {start} and {stop}")


@dataclass(frozen=True)
class EscapeConfig(EscapeRule):
    """The escape check of Algorithm 1."""

    examples: int = 1024  # of each worker, on which f is evaluated

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(examples=self.examples)


@dataclass(frozen=True, kw_only=True)
class CertifyConfig(Search):
    """Certificates along the run (see `packsaddle.certify`), and iterates kept to be certified afterwards."""

    epsilon: float  # gradient norm at most epsilon, smallest eigenvalue at least -sqrt(rho epsilon)
    hessian_lipschitz: float | None = None  # rho; by default measured along the escape direction
    every: float | None = None  # epochs between certificates; by default none along the run
    at: tuple[float, ...] = ()  # epochs of further certificates
    last_epsilon: float | None = None  # of the last point, where gradients may be larger; by default epsilon
    iterates: int = 0  # m, drawn uniformly from x_0 ... x_T and kept, for packsaddle certify --iterates
    examples: int = 1024  # of each worker, along the run
    max_hvps: int = 100
    pilot_examples: int = 0  # curves need bounds from both sides

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(epsilon=self.epsilon, last_epsilon=self.last_epsilon, examples=self.examples)
        check_positive(hessian_lipschitz=self.hessian_lipschitz)
        _epochs(self, "every")
        check_not_negative(iterates=self.iterates)
        _at_most(self, iterates=10**6)
        if any(not 0 < epoch <= _EPOCHS[1] for epoch in self.at):
            raise ValueError(f"at must be epochs after the start, at most {_EPOCHS[1]:g}, got {list(self.at)}")


@dataclass(frozen=True)
class LocalConfig:
    """Local updates: workers step separately and exchange their changes (see `packsaddle.LocalUpdates`).

    A round is one exchange of a fragment.
    """

    every: int = 30  # H, steps between two exchanges
    # the optimizer of each worker, with lr and weight_decay, and of sgd and muon with momentum and nesterov; muon:
    # matrices of hidden layers by Muon (momentum 0.95 with nesterov unless there is one), the rest by AdamW
    optimizer: Literal["sgd", "adamw", "muon"] = "adamw"
    betas: tuple[float, ...] = (0.9, 0.999)  # of AdamW
    warm_up: float = 0.0  # epochs in which lr rises linearly at the start
    schedule: Literal["constant", "cosine"] = "constant"  # of lr after that; cosine: down to a tenth at the end
    clip: float | None = None  # the largest norm of a gradient, which is scaled down to it; by default any
    keep_unsent: bool = True  # after a round a worker starts at the anchor less its own error, not at the anchor
    overlap: Overlap = field(default_factory=Overlap)
    outer: OuterSGD | None = None

    # Keys of earlier versions, and those that replace them.
    moved_keys: ClassVar[Mapping[str, str]] = {
        "outer_lr": "local.outer.lr",
        "outer_momentum": "local.outer.momentum",
        "outer_nesterov": "local.outer.nesterov",
        "decay": "decay",
        "fragments": "local.overlap.fragments",
        "delay": "local.overlap.delay",
        "reduction": 'exchange = "senders"',
    }

    def __post_init__(self) -> None:
        check_positive(every=self.every, clip=self.clip)
        _at_most(self, every=10**6)
        check_not_negative(warm_up=self.warm_up)
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {list(self.betas)}")
        if self.optimizer == "sgd" and self.betas != (0.9, 0.999):
            raise ValueError(f"betas are options of adamw and muon, and sgd has none, got {list(self.betas)}")
        LocalOptions(Compression(Identity()), self.every, overlap=self.overlap)


@dataclass(frozen=True, kw_only=True)
class Config(Compression):
    """One run; the options of `Compression` are keys of it."""

    data: DataConfig
    model: ModelConfig
    lr: float  # eta, the step size
    epochs: float  # passes of all workers together over the data
    batch_size: int  # examples per worker and step
    # the compressor of each worker's vector in a step; `packsaddle compressors` compares the kinds
    compressor: AnyCompressor = field(default_factory=Identity)
    # the compressor of the mean on its way back, in the two-way and coordinator exchanges
    back: AnyCompressor | None = None
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    escape: EscapeConfig | None = None
    certify: CertifyConfig | None = None
    local: LocalConfig | None = None
    label: str = ""  # name in tables and figures; by default the folder's
    weight_decay: float = 0.0  # times x is added to the gradient, before compression; of adamw and muon their own
    momentum: float = 0.0  # of each worker's gradients, before compression
    nesterov: bool = False  # Nesterov's momentum
    memory: Literal["buffer", "ef21"] = "buffer"  # buffer: error feedback; ef21: an estimate of the gradient instead
    # STORM's variance reduction, by two gradients a step: the weight of a new one; by default off
    storm: float | None = None
    precision: Literal["float32", "float64", "bfloat16"] = "float32"  # bfloat16: the forward pass alone (autocast)
    # consecutive steps (with [local] rounds) that may be skipped because a gradient was not finite
    max_skipped: int = 20
    monitor_every: int = field(default=0, init=False)  # once for each line of metrics
    seed: int = 0  # of everything random
    workers: int = 1  # W; --workers overrides
    log_every: int = 100  # steps that one line of metrics averages
    test_every: float | None = None  # epochs between tests along the run; by default at its end alone
    plateau: float | None = None  # the loss of a plateau whose length is to be measured

    def __post_init__(self) -> None:
        _epochs(self, "epochs", "test_every")
        check_positive(batch_size=self.batch_size, workers=self.workers, log_every=self.log_every, plateau=self.plateau)
        _at_most(self, batch_size=2**24, workers=2**20)
        check_not_negative(lr=self.lr, weight_decay=self.weight_decay)
        super().__post_init__()
        if self.storm is not None:
            if self.momentum:
                raise ValueError(f"storm takes the place of a momentum: it needs momentum = 0, got {self.momentum:g}")
            Storm(self.storm)
        if self.local is not None:
            self._check_local(self.local)
        elif self.exchange == "senders" or self.decay != 1:
            raise ValueError('exchange = "senders" and a decay are of [local], and the configuration has none')

    def _check_local(self, local: LocalConfig) -> None:
        """Raise ValueError, which begins with the key, for what does not go with local updates."""
        if self.memory != "buffer":
            raise ValueError(f'memory must be "buffer" with [local], got {self.memory!r}')
        if not self.decay:
            raise ValueError(f"decay must be in (0, 1] for local updates, got {self.decay!r}")

        # Each worker steps with local.optimizer: lr, momentum and nesterov are its options.
        if self.storm is not None:
            raise ValueError("storm does not go with [local], whose workers step with optimizers of their own")
        if self.momentum and local.optimizer == "adamw":
            raise ValueError('momentum is of local.optimizer = "sgd" and "muon"; of adamw set local.betas')
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        if local.warm_up >= self.epochs:
            raise ValueError(f"local.warm_up must be less than epochs = {self.epochs:g}, got {local.warm_up:g}")
        if self.escape is not None and (local.overlap.fragments > 1 or local.overlap.delay):
            raise ValueError("escape needs local.overlap.fragments = 1 and delay = 0: it compares whole anchors")

    @property
    def averaging(self) -> Exchange:
        """The exchange of the run: what the configuration says, or what its front does without."""
        return self.exchange or ("direct" if self.local is None else "auto")

    def compression(self) -> Compression:
        """Return the options of compression alone; contraction is measured once for each line of metrics."""
        values = {f.name: getattr(self, f.name) for f in fields(Compression)}
        return Compression(**values | {"monitor_every": self.log_every})

    def sgd_lr(self) -> float | None:
        """Return the step size of the plain SGD that the run amounts to; None if it is none."""
        if self.local is not None and (self.local.optimizer != "sgd" or self.local.outer is not None):
            return None
        return self.lr / (1 - self.momentum)


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration from a TOML file, with `key=value` overrides by dotted key. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # an editor on Windows may write a byte order mark
        if is_too_deep(text):
            raise RecursionError
        data = tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    except ValueError as error:
        raise ConfigError(syntax_error(path, error)) from None
    except RecursionError:
        raise ConfigError(f"{path}: lists, tables or keys are nested too deeply") from None
    return configure(data, overrides, lambda key: line_of(key, path, text))


def configure(
    data: dict[str, Any], overrides: Sequence[str], origin: Callable[[tuple[str, ...]], str] = lambda key: ""
) -> Config:
    """Return the configuration of nested dictionaries, changed in place by `key=value` overrides by dotted key.

    Raises ConfigError, which says which override is to blame, or else `origin` of the key.
    """
    given = {override(data, text): f"--set {shortened(text)}" for text in overrides}
    try:
        return build(Config, data)
    except ConfigError as error:
        where = _origin(error.key, given) or origin(error.key)
        same = [text for k, text in given.items() if k[:1] == error.key[:1] and text != where]
        also = f" (with {same[-1]})" if same else ""  # a value in the file may be wrong because of an override
        drop = f"; --set {'.'.join(error.key)}= drops it" if same and str(error).startswith("unknown key") else ""
        raise ConfigError(f"{where}{also}: {error}{drop}" if where else str(error), error.key) from None


def _origin(key: tuple[str, ...], given: dict[tuple[str, ...], str]) -> str:
    """The last override that set a key or a table around it, else one that set something in it; else ""."""
    found = [k for k in given if key[: len(k)] == k] or [k for k in given if k[: len(key)] == key != ()]
    return given[found[-1]] if found else ""


def override(data: dict[str, Any], assignment: str) -> tuple[str, ...]:
    """Apply one `key=value` by dotted key to nested dictionaries, in place, and return the key; `key=` drops the key.

    Raises ConfigError.
    """
    name, equals, text = assignment.partition("=")
    if not equals or not name:
        raise ConfigError(f"--set takes key=value, got {shown(assignment)}")
    try:
        if is_too_deep(text):
            raise RecursionError
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    except (ValueError, RecursionError):
        raise ConfigError(f"--set {shortened(assignment)}: too many digits, or brackets in brackets") from None

    # Tables on the way are created.
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


def _epochs(config: Any, *names: str) -> None:
    """Check numbers of epochs: between those, steps can be counted in 64 bits."""
    check_positive(**{name: getattr(config, name) for name in names})
    for name in names:
        value = getattr(config, name)
        if value is not None and not _EPOCHS[0] <= value <= _EPOCHS[1]:
            raise ValueError(f"{name} must be from {_EPOCHS[0]:g} to {_EPOCHS[1]:g} epochs, got {value}")


def _at_most(config: Any, **most: int) -> None:
    for name, limit in most.items():
        if getattr(config, name) > limit:
            raise ValueError(f"{name} must be at most {limit:,}, got {getattr(config, name)}")
