"""The options of data sets and networks."""

from dataclasses import dataclass
from typing import Literal

from packsaddle.errors import check_counts


@dataclass(frozen=True)
class DataConfig:
    """The training examples, and their distribution to the workers."""

    name: Literal["digits", "mnist", "cifar10", "folder", "text"]  # folder: train/CLASS/* and test/CLASS/* images
    # iid: at random; class: worker i gets the classes c with c mod W = i, or of text the i-th of W consecutive parts
    shard: Literal["iid", "class"] = "iid"
    limit: int | None = None  # use only this many training examples; by default all
    context: int = 64  # text only: characters per example

    def __post_init__(self) -> None:
        check_counts(limit=self.limit, context=self.context)
        if self.name != "text" and self.context != 64:
            raise ValueError(f"context is only for text, got name = {self.name!r}")


@dataclass(frozen=True)
class ModelConfig:
    """The network."""

    # mnist-autoencoder: the paper's; autoencoder: fully connected, with the widths below
    name: Literal["mnist-autoencoder", "autoencoder", "resnet18", "resnet34", "char-transformer"]
    widths: tuple[int, ...] = ()  # autoencoder: units of the encoder's layers after the input; the decoder mirrors them
    output: Literal["sigmoid", "linear"] = "sigmoid"  # autoencoders: the last activation
    width: int = 64  # resnet: channels of the first stage; char-transformer: embedding dimension
    stem: Literal["small", "imagenet"] = "small"  # resnet: 3 x 3 convolution, or 7 x 7 with stride 2 and max pooling
    norm: Literal["worker", "all", "group"] = "worker"  # resnet: batch norm per worker or over all, or group norm
    depth: int = 2  # char-transformer: number of blocks
    heads: int = 2  # char-transformer: attention heads, of dimension width / heads each

    def __post_init__(self) -> None:
        if self.width < 4:
            raise ValueError(f"width must be at least 4, got {self.width}")
        resnet, text = "resnet" in self.name, self.name == "char-transformer"
        self._check_applies("a resnet", resnet, stem="small", norm="worker")
        self._check_applies("a resnet or the char-transformer", resnet or text, width=64)
        self._check_applies("the char-transformer", text, depth=2, heads=2)
        self._check_applies("an autoencoder", "autoencoder" in self.name, output="sigmoid")
        if (self.name == "autoencoder") != bool(self.widths):
            raise ValueError(f"widths must be set for the autoencoder, and for no other model, got {list(self.widths)}")
        if any(w < 1 for w in self.widths):
            raise ValueError(f"widths must be at least 1, got {list(self.widths)}")
        check_counts(depth=self.depth, heads=self.heads)
        if text and self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got {self.width} and {self.heads}")

    def _check_applies(self, models: str, applies: bool, **defaults: object) -> None:
        for name, default in defaults.items():
            if not applies and getattr(self, name) != default:
                raise ValueError(f"{name} is only for {models}, got name = {self.name!r}")
