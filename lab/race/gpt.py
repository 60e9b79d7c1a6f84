"""The workload of the race: nanoGPT's network, its recipe for a CPU, and the optimizers of a worker.

The network has 4 layers, 4 heads, width 128 and no biases (0.80 million parameters); the recipe is 2,000 steps of 12
windows of 64 characters, AdamW with betas 0.9 and 0.99, a rate of 0.001 with 100 steps of warm-up and a cosine to a
tenth, and gradients clipped to norm 1. nanoGPT's README reports a loss of 1.88 on tinyshakespeare.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

BATCH, STEPS, RATE, WARM_UP = 12, 2000, 1e-3, 100


@dataclass(frozen=True)
class Network:
    """The size of a network. The default is that of nanoGPT's recipe for a CPU."""

    width: int = 128
    layers: int = 4
    head: int = 32  # width of an attention head
    block: int = 64  # characters or tokens of a window


NETWORKS = {
    "0.05M": Network(64, 1),
    "0.1M": Network(64, 2),
    "0.3M": Network(96, 3),
    "0.8M": Network(),
    "124M": Network(768, 12, 64, 1024),  # without GPT-2's biases
}


@dataclass(frozen=True)
class Recipe(Network):
    """A training: its network, its length, its optimizer, and its learning rate by nanoGPT's schedule.

    The learning rate has a linear warm-up and a cosine to a tenth.
    """

    steps: int = STEPS
    rate: float = RATE  # the highest learning rate
    warm_up: int = WARM_UP  # steps
    batch: int = BATCH  # windows of a step of one worker
    inner: Literal["adamw", "muon"] = "adamw"  # "muon": Muon for the layers' matrices

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warm_up:
            return self.rate * (step + 1) / (self.warm_up + 1)
        after = (step - self.warm_up) / (self.steps - self.warm_up)
        return 0.1 * self.rate + 0.45 * self.rate * (1 + math.cos(math.pi * after))


class Layer(nn.Module):
    """A transformer layer of nanoGPT: causal self-attention and an MLP, both after a norm and without biases."""

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, width // self.head, self.head).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, width))
        y: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return y


class GPT(nn.Module):
    """nanoGPT's network, whose output layer shares the weights of the embedding.

    A call returns the mean loss of predicting the characters or tokens y from x, int64[n, block] each.
    """

    def __init__(self, vocabulary: int, seed: int, size: Network = Network()) -> None:
        super().__init__()
        width, layers = size.width, size.layers
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(size.block, width)
        self.layers = nn.ModuleList(Layer(width, size.head) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        rng = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                is_residual = name.endswith(("out.weight", "down.weight"))
                p.data.normal_(0, 0.02 / (math.sqrt(2 * layers) if is_residual else 1), generator=rng)

    @property
    def size(self) -> int:
        """The number of parameters without those of the positions, as nanoGPT prints it."""
        return sum(p.numel() for p in self.parameters()) - self.places.weight.numel()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.tokens(x) + self.places.weight
        for layer in self.layers:
            h = layer(h)
        logits = functional.linear(self.norm(h), self.tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1), y.flatten())


def make_optimizers(net: GPT, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return the recipe's AdamW, which decays only matrices. "muon" is Muon for the layers' matrices before it."""
    hidden = [p for p in net.layers.parameters() if p.dim() >= 2 and recipe.inner == "muon"]
    rest = [p for p in net.parameters() if all(p is not each for each in hidden)]
    groups = [
        {"params": [p for p in rest if (p.dim() >= 2) is has_decay], "weight_decay": 0.1 * has_decay}
        for has_decay in (True, False)
    ]
    adamw = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.99))
    return [muon(hidden, recipe.rate), adamw] if hidden else [adamw]


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
