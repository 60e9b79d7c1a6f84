"""Parts of trainings with Muon and AdamW: the inner optimizers, the loss on held-out windows, and a compressor."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lab.tasks import Dataset
from packsaddle.comm import resolve
from packsaddle.compressors import Compressor, Message

_NOT_HIDDEN = ("characters.weight", "places.weight", "head.weight")  # matrices that AdamW trains
_AT_ONCE = 64  # number of windows in one forward pass of an evaluation


def make_inner(
    network: nn.Module, inner: str, rate: float, betas: tuple[float, float], momentum: float = 0.95
) -> list[torch.optim.Optimizer]:
    """Return the inner optimizers of a worker.

    With `inner` "muon" they are Muon for hidden matrices, and AdamW for all remaining parameters at the same rate;
    otherwise there is only AdamW. `betas` is for AdamW, `momentum` for Muon.
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
    """Return torch's Muon, with fast steps also on processors without instructions for bfloat16.

    A step multiplies matrices in bfloat16. On such a processor torch emulates this, which takes ten times as long.
    """
    made = torch.optim.Muon(matrices, rate, weight_decay, momentum, adjust_lr_fn="match_rms_adamw")
    entered = ExitStack()

    def enter(*step: object) -> None:
        entered.enter_context(ProductsInFloat32())

    def leave(*step: object) -> None:
        entered.close()

    # Use hooks of the optimizer: in a subclass with its own step, torch would run all registered hooks twice.
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        made.register_step_pre_hook(enter)
        made.register_step_post_hook(leave)
    return made


class ProductsInFloat32(TorchFunctionMode):
    """A context in which products of bfloat16 matrices are computed in float32 and rounded to bfloat16.

    Instructions for bfloat16 do the same, except that the order of summation differs.
    """

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, with matrix products of bfloat16 replaced. PyTorch calls this method."""
        if func not in (Tensor.matmul, Tensor.__matmul__, torch.addmm) or args[0].dtype != torch.bfloat16:
            return func(*args, **(kwargs or {}))
        return func(*(a.float() for a in args), **(kwargs or {})).bfloat16()


def held_out_loss(network: nn.Module, held_out: Dataset, windows: Tensor) -> float:
    """Return the mean loss on the held-out windows with the indices `windows`; collective.

    Each worker evaluates a part of the windows.
    """
    group, cpu = resolve(None), torch.device("cpu")
    mine = torch.split(windows[group.rank :: group.size], _AT_ONCE)
    total = torch.tensor([sum(float(network(*held_out.batch(i, cpu))) * len(i) for i in mine)])
    group.all_reduce(total)
    return float(total) / len(windows)


@dataclass(frozen=True)
class Half(Compressor):
    """A compressor that sends all coordinates in float16, which an all-reduce in float16 averages.

    It is for local SGD that averages in 16 bits.
    """

    fixed_size: ClassVar[bool] = True

    @property
    def linear(self) -> bool:
        """True, except for rounding."""
        return True

    def mu(self, d: int) -> float:
        """Return the contraction for values in float16's normal range, whose relative error is at most 2^-11."""
        return 1 - 2.0**-22

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        """Round the vector to float16. Values below 6e-8 become 0; the error memory keeps the rounding error."""
        return Message({"values": v.half()})

    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        """Add alpha times the values of a message to `out`, in place."""
        out.add_(message.parts["values"].to(out.dtype), alpha=alpha)
