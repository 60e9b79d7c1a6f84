"""A small decoder-only transformer over characters, for plain SGD and for second derivatives."""

import math

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal self-attention: position i of [b, length, width] sees positions 0 to i."""

    def __init__(self, width: int, heads: int, gain: float) -> None:
        super().__init__()
        self.heads = heads
        self.inwards = linear(width, 3 * width)
        self.outwards = linear(width, width, gain)

    def forward(self, x: Tensor) -> Tensor:
        """Return what each position reads, [b, length, width]."""
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.inwards(x).chunk(3, 2)
        )
        # Spelled out: the fused kernels of scaled_dot_product_attention have no second derivative, which
        # certificates need; at 64 characters they would save a few percent of a step.
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
        later = torch.ones(scores.shape[2:], dtype=torch.bool, device=x.device).triu(1)
        read = scores.masked_fill(later, -math.inf).softmax(3) @ value
        joined: Tensor = self.outwards(read.transpose(1, 2).flatten(2))
        return joined


class Block(nn.Module):
    """Attention, then a GELU network of four times the width, each added to its input after a norm of it."""

    def __init__(self, width: int, heads: int, gain: float) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, gain)
        self.mlp = nn.Sequential(linear(width, 4 * width), nn.GELU(), linear(4 * width, width, gain))

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, length, width] to the same."""
        x = x + self.attention(self.attention_norm(x))
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class CharTransformer(nn.Module):
    """`depth` blocks between learned embeddings of characters and places, and logits of the next character.

    Without dropout, so that the loss is a function of weights and batch alone; input and output embeddings are two
    tensors, since CompressedSGD refuses parameters that share memory. It starts with small embeddings, whose gradients
    the first norms then enlarge, as SGD of one step size for all needs; with residual branches that add up to about
    the width of one; and with nearly even logits, so at a loss near log(classes).
    """

    def __init__(self, classes: int, context: int, *, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(classes, width), nn.Embedding(context, width)
        for embedding in (self.characters, self.places):
            nn.init.normal_(embedding.weight, std=0.1)
        gain = 1 / math.sqrt(2 * depth)
        self.blocks = nn.Sequential(*(Block(width, heads, gain) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = linear(width, classes, 0.1)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the logits of every next character, [b, length, classes], from codes int64[b, length], length at
        most the context."""
        places = self.places.weight[: codes.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(self.characters(codes) + places)))
        return logits


def linear(width_in: int, width_out: int, gain: float = 1.0) -> nn.Linear:
    """A linear layer that starts without bias and turns inputs of variance 1 into outputs of deviation `gain`."""
    layer = nn.Linear(width_in, width_out)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(width_in))
    nn.init.zeros_(layer.bias)
    return layer
