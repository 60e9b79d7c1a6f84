"""Who takes part in a race: packsaddle's compressors and torch's own ways to exchange gradients, by name."""

import ast
import re
from dataclasses import dataclass
from typing import Any, get_args

from packsaddle import compressors
from packsaddle.compressors import Compressor
from packsaddle.experiments.schema import nearest
from packsaddle.optim.hook import Scope
from packsaddle.optim.memory import Memory

ALONE = "alone"  # SGD on every worker without any exchange: what computing costs
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
_OPTION = re.compile(r"\s+(lr|noise|momentum|memory|local_steps|hook)=(\S+)$")
_NUMBERED = re.compile(r"^(powersgd|local-sgd)-(\d+)$")


@dataclass(frozen=True)
class Contender:
    """One way to train. Exactly one of `peer` and `compressor` is set."""

    text: str  # as the user wrote it
    lr: float
    noise: float = 0.0  # packsaddle's only, as all up to `hook`
    momentum: float = 0.0
    memory: Memory = "buffer"
    local_steps: int = 1
    hook: Scope | None = None  # the scope of a hook behind DDP, "bucket" or "model"; else CompressedSGD
    peer: str = ""  # a name of PEERS, its N as `number`
    number: int = 1
    compressor: Compressor | None = None

    @property
    def period(self) -> int:
        """After how many steps its exchanges repeat."""
        return self.number if self.peer == "local-sgd-N" else self.local_steps


def parse(text: str, lr: float) -> Contender:
    """Read "ddp", "powersgd-4 lr=0.3", "RandomK(0.01) noise=0.01" and the like; raises ValueError.

    `lr` is the step size of contenders that name none.
    """
    name, options = text.strip(), dict[str, Any]()
    while match := _OPTION.search(name):
        name, options[match[1]] = name[: match.start()], _value(match[1], match[2], text)
    lr = options.pop("lr", lr)
    if name[:1].isupper():
        if "hook" in options and not options.keys() <= {"hook", "noise"}:
            raise ValueError(f"contender {text!r}: of momentum, memory and local_steps a hook has none")
        return Contender(text, lr, compressor=_compressor(name), **options)
    if options:
        raise ValueError(f"contender {text!r}: {min(options)} is for packsaddle's compressors, torch's peers have none")
    if match := _NUMBERED.match(name):
        if int(match[2]) < 1:
            raise ValueError(f"contender {text!r}: N must be at least 1, got {match[2]}")
        return Contender(text, lr, peer=f"{match[1]}-N", number=int(match[2]))
    if name not in PEERS or name.endswith("-N"):
        raise ValueError(
            f"contender must be a compressor such as RandomK(0.01), or one of {', '.join(PEERS)}, got {text!r}"
            f"{nearest(name, PEERS)}"
        )
    return Contender(text, lr, peer=name)


def parse_all(texts: tuple[str, ...], lr: float) -> list[Contender]:
    """Read contenders, each once. Raises ValueError."""
    return [parse(text, lr) for text in dict.fromkeys(texts)]


def _value(option: str, written: str, text: str) -> float | int | str:
    """Read the value of an option. Raises ValueError."""
    words = {"memory": get_args(Memory), "hook": get_args(Scope)}
    if option in words:
        if written not in words[option]:
            raise ValueError(f"contender {text!r}: {option} must be one of {', '.join(words[option])}, got {written!r}")
        return written
    try:
        value = int(written) if option == "local_steps" else float(written)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        what = "an integer above 0" if option == "local_steps" else "a positive number"
        raise ValueError(f"contender {text!r}: {option} must be {what}, got {written!r}")
    return value


def _compressor(text: str) -> Compressor:
    """Read a compressor's constructor call, such as TopK(0.01, values="int8")."""
    classes = {name: getattr(compressors, name) for name in compressors.__all__}
    known = {
        n: c for n, c in classes.items() if isinstance(c, type) and issubclass(c, Compressor) and c is not Compressor
    }
    try:
        call = ast.parse(text if "(" in text else f"{text}()", mode="eval").body
        assert isinstance(call, ast.Call)
        assert isinstance(call.func, ast.Name)
        arguments = [ast.literal_eval(a) for a in call.args]
        named = {k.arg or "": ast.literal_eval(k.value) for k in call.keywords}
        name = call.func.id
    except (SyntaxError, AssertionError, ValueError):
        raise ValueError(f"contender {text!r} must look like RandomK(0.01)") from None
    if name not in known:
        raise ValueError(f"contender {text!r}: no compressor {name}{nearest(name, known)}")
    try:
        made = known[name](*arguments, **named)
    except (TypeError, ValueError) as error:
        raise ValueError(f"contender {text!r}: {error}") from None
    assert isinstance(made, Compressor)
    return made
