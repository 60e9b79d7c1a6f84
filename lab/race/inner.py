"""Parts of trainings with Muon and AdamW: the inner optimizers, the loss on held-out windows, and a compressor."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lab.runs.tasks import Dataset
from packsaddle.comm import resolve
from packsaddle.compressors import Compressor, Message

_NOT_HIDDEN = ("characters.weight", "places.weight", "head.weight")  # matrices that AdamW trains
_AT_ONCE = 64  # windows


def make_inner(
    network: nn.Module, inner: str, rate: float, betas: tuple[float, float], momentum: float = 0.95
) -> list[torch.optim.Optimizer]:
    """Return AdamW, or for `inner` "muon" Muon for hidden matrices and AdamW for the rest, at the same rate.

    `betas` are AdamW's, `momentum` is Muon's.
    """
    named = [(p.ndim == 2 and not name.endswith(_NOT_HIDDEN), p) for name, p in network.named_parameters()]
    matrices = [p for is_hidden, p in named if is_hidden and inner == "muon"]
    others = [p for is_hidden, p in named if not (is_hidden and inner == "muon")]
    adamw = torch.optim.AdamW(others, rate, betas=betas, weight_decay=0.1)
    if not matrices:
        return [adamw]
    return [muon(matrices, rate, momentum), adamw]


def muon(
    matrices: Iterable[Tensor], rate: float, momentum: float = 0.95, weight_decay: float = 0.1
) -> torch.optim.Muon:
    """Return torch's Muon, whose steps are fast without instructions for bfloat16 as well.

    A step multiplies matrices in bfloat16, which torch emulates on such a processor, in ten times the time.
    """
    made = torch.optim.Muon(matrices, rate, weight_decay, momentum, adjust_lr_fn="match_rms_adamw")
    entered = ExitStack()

    def enter(*step: object) -> None:
        entered.enter_context(ProductsInFloat32())

    def leave(*step: object) -> None:
        entered.close()

    # Hooks, since the step of a subclass would run the hooks of others twice.
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        made.register_step_pre_hook(enter)
        made.register_step_post_hook(leave)
    return made


class ProductsInFloat32(TorchFunctionMode):
    """Within it, products of bfloat16 matrices are computed in float32 and rounded to bfloat16.

    That is what the instructions for bfloat16 do; only the order of the sums differs.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute one function of torch."""
        if func not in (Tensor.matmul, Tensor.__matmul__, torch.addmm) or args[0].dtype != torch.bfloat16:
            return func(*args, **(kwargs or {}))
        return func(*(a.float() for a in args), **(kwargs or {})).bfloat16()


def held_out_loss(network: nn.Module, held_out: Dataset, windows: Tensor) -> float:
    """Return the mean loss on some windows, of which each worker evaluates a part; collective."""
    group, cpu = resolve(None), torch.device("cpu")
    mine = torch.split(windows[group.rank :: group.size], _AT_ONCE)
    total = torch.tensor([sum(float(network(*held_out.batch(i, cpu))) * len(i) for i in mine)])
    group.all_reduce(total)
    return float(total) / len(windows)


@dataclass(frozen=True)
class Half(Compressor):
    """All coordinates in float16, averaged by an all-reduce in float16: local SGD that averages in 16 bits."""

    fixed_size: ClassVar[bool] = True

    @property
    def linear(self) -> bool:
        """True, except for rounding."""
        return True

    def mu(self, d: int) -> float:
        """Return the contraction for values in float16's normal range, whose relative error is at most 2^-11."""
        return 1 - 2.0**-22

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        """Round to float16; smaller values than 6e-8 become 0, and the error memory keeps the difference."""
        return Message({"values": v.half()})

    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        """Add alpha times the values to `out`."""
        out.add_(message.parts["values"].to(out.dtype), alpha=alpha)
