"""The contenders of a race: packsaddle's compressors and torch's own ways to exchange gradients, by name."""

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from packsaddle.compressors import Compressor, parse_compressor
from packsaddle.options import nearest

Scope = Literal["bucket", "model"]  # see packsaddle.register_ddp_hook
ALONE = "alone"  # SGD on every worker without an exchange: the cost of computing
DENSE = "ddp"
PEERS = {
    ALONE: "SGD without any exchange",
    DENSE: "DistributedDataParallel",
    "ddp-fp16": "torch's fp16_compress_hook",
    "ddp-bf16": "torch's bf16_compress_hook",
    "ddp-uint8": "torch's quantization_pertensor_hook",
    "own-uint8": "a uint8 per-bucket quantising hook of this benchmark's own, for torch's does not run on gloo",
    "powersgd-N": "torch's powerSGD_hook of rank N, from the third step on; in one bucket, for gloo mixes up several",
    "local-sgd-N": "torch's PostLocalSGDOptimizer, parameters averaged every N steps",
    "diloco-N": "torchft's DiLoCo, every N steps; Nesterov momentum outside",
    "sparseloco-N": "SparseLoCo's published algorithm, run by LocalUpdates every N steps: TopK 64 of 4,096 in 2 bits, "
    "error feedback with decay 0.95, outer SGD of rate 1",
}
FIELD = (
    DENSE,
    "RandomK(0.01)",
    "TopK(0.01)",
    "ddp-fp16",
    "ddp-bf16",
    "ddp-uint8",
    "own-uint8",
    "powersgd-1",
    "powersgd-4",
    "local-sgd-4",
)
_OPTION = re.compile(r"\s+(lr|steps|noise|momentum|hook|every|delay|fragments|outer)=(\S+)$")
_WORDS = {"hook": get_args(Scope), "outer": ("none", "nesterov")}
_WHOLE = ("steps", "every", "delay", "fragments")
_NUMBERED = re.compile(r"^(powersgd|local-sgd|diloco|sparseloco)-(\d+)$")
_PERIODIC = ("local-sgd-N", "diloco-N", "sparseloco-N")


@dataclass(frozen=True)
class Contender:
    """One method of training. Exactly one of `peer` and `compressor` is set.

    The compressor is for CompressedSGD, or with `hook` for a hook of DDP, or with `every` for local updates;
    `outer="nesterov"` is DiLoCo's outer optimizer.
    """

    text: str  # the contender as the user wrote it
    lr: float
    steps: int | None = None  # number of training steps; None: the race's number
    noise: float = 0.0  # standard deviation; this and all fields up to `outer` are for packsaddle's methods only
    momentum: float = 0.0
    hook: Scope | None = None  # scope of the hook, "bucket" or "model"; None: no hook
    every: int | None = None
    delay: int = 0
    fragments: int = 1
    outer: str = "none"
    peer: str = ""  # a name in PEERS, in which N stands for `number`
    number: int = 1
    compressor: Compressor | None = None

    @property
    def period(self) -> int:
        """The period of the method's exchanges, in steps."""
        return self.number if self.peer in _PERIODIC else self.every or 1

    @property
    def name(self) -> str:
        """The contender's text without its options."""
        return _split(self.text)[0]

    @property
    def method(self) -> str:
        """The contender's text without step size and number of steps, which are tuned for each method."""
        return " ".join(word for word in self.text.split() if not word.startswith(("lr=", "steps=")))


def parse(text: str, lr: float) -> Contender:
    """Read a contender from text such as "ddp", "powersgd-4 lr=0.3" or "RandomK(0.01) noise=0.01". Raises ValueError.

    `lr` is the step size of a contender whose text has none.
    """
    name, written = _split(text)
    options: dict[str, Any] = {option: _value(option, value, text) for option, value in written.items()}
    lr, steps = options.pop("lr", lr), options.pop("steps", None)
    if name[:1].isupper():
        if "hook" in options and not options.keys() <= {"hook", "noise"}:
            raise ValueError(f"contender {text!r}: a hook has noise, and of momentum and every none")
        if "every" not in options and (lacking := options.keys() & {"delay", "fragments", "outer"}):
            raise ValueError(f"contender {text!r}: {min(lacking)} is of local updates, which need every=")
        every = options.get("every", 1)
        if options.get("delay", 0) >= every:
            raise ValueError(f"contender {text!r}: delay must be below every = {every}, got {options['delay']}")
        if options.get("fragments", 1) > every:
            raise ValueError(
                f"contender {text!r}: fragments must be at most every = {every}, got {options['fragments']}"
            )
        return Contender(text, lr, steps, compressor=_compressor(name), **options)
    if options:
        raise ValueError(f"contender {text!r}: {min(options)} is for packsaddle's compressors, torch's peers have none")
    if match := _NUMBERED.match(name):
        if int(match[2]) < 1:
            raise ValueError(f"contender {text!r}: N must be at least 1, got {match[2]}")
        return Contender(text, lr, steps, peer=f"{match[1]}-N", number=int(match[2]))
    if name not in PEERS or name.endswith("-N"):
        raise ValueError(
            f"contender must be a compressor such as RandomK(0.01), or one of {', '.join(PEERS)}, got {text!r}"
            f"{nearest(name, PEERS)}"
        )
    return Contender(text, lr, steps, peer=name)


def parse_all(texts: tuple[str, ...], lr: float) -> list[Contender]:
    """Read contenders from their texts, without duplicates. Raises ValueError for an invalid text."""
    return [parse(text, lr) for text in dict.fromkeys(texts)]


def _split(text: str) -> tuple[str, dict[str, str]]:
    """Split a contender's text into its name and its options, as {option: written value}."""
    name, options = text.strip(), dict[str, str]()
    while match := _OPTION.search(name):
        name, options[match[1]] = name[: match.start()], match[2]
    return name, options


def _value(option: str, written: str, text: str) -> float | int | str:
    """Read the `written` value of an option. Raises ValueError, which quotes `text`, the whole contender."""
    if option in _WORDS:
        if written not in _WORDS[option]:
            raise ValueError(
                f"contender {text!r}: {option} must be one of {', '.join(_WORDS[option])}, got {written!r}"
            )
        return written
    try:
        value = int(written) if option in _WHOLE else float(written)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        what = "an integer above 0" if option in _WHOLE else "a positive number"
        raise ValueError(f"contender {text!r}: {option} must be {what}, got {written!r}")
    return value


def _compressor(text: str) -> Compressor:
    try:
        return parse_compressor(text)
    except ValueError as error:
        raise ValueError(f"contender {text!r}: {error}") from None
