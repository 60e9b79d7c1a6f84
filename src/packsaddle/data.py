"""Examples in memory, dealt to workers, and read in batches that are pure functions of (seed, worker, step)."""

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from packsaddle.calendar import History
from packsaddle.config import DataConfig
from packsaddle.dataset import Dataset
from packsaddle.schema import ConfigError
from packsaddle.seeds import Stream, generator
from packsaddle.text import load_text


class MissingExtraError(ConfigError):
    """A feature needs a package that is not installed."""


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or raise MissingExtraError that names the extra which brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = {"sklearn": "scikit-learn"}.get(module.split(".")[0], module.split(".")[0])
        raise MissingExtraError(f"{purpose} needs {package}: pip install 'packsaddle[{extra}]'") from error


@dataclass(frozen=True)
class Images:
    """Images and their classes; pixels are levels / full_scale, in [0, 1]."""

    levels: Tensor  # uint8[n, channels, height, width]
    labels: Tensor  # int64[n]
    full_scale: int
    classes: int

    def __len__(self) -> int:
        return len(self.levels)

    @property
    def shape(self) -> torch.Size:
        """An image's shape, [channels, height, width]."""
        return self.levels.shape[1:]

    def owners(self, workers: int) -> Tensor:
        """Worker c mod W gets class c: int64[n]."""
        return self.labels % workers

    def pixels(self, index: Tensor) -> Tensor:
        """Return the chosen images, float32[b, channels, height, width] in [0, 1]."""
        return self.levels[index].to(torch.float32).div_(self.full_scale)

    def batch(self, index: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return the chosen images' pixels and labels on a device."""
        return self.pixels(index).to(device, dtype), self.labels[index].to(device)


def load_data(config: DataConfig, data_dir: Path | None, *, train: bool, download: bool = False) -> Dataset:
    """Load the training or test part of images or of a text. Raises ConfigError that names what is missing."""
    try:
        if config.name == "text":
            return load_text(config, data_dir, train=train)
        return load_images(config, data_dir, train=train, download=download)
    except OSError as error:
        raise ConfigError(f"--data-dir {data_dir} cannot be read: {error}") from None


def load_images(config: DataConfig, data_dir: Path | None, *, train: bool, download: bool = False) -> Images:
    """Load the training or test part of a dataset. Raises ConfigError that names what is missing."""
    images = _load(config.name, data_dir, train, download)
    if config.limit is None or not train:
        return images
    if config.limit > len(images):
        raise ConfigError(f"data.limit must be at most {len(images)} (the examples of {config.name})")
    # At random, since image folders are sorted by class; the same for every seed of a run.
    chosen = torch.randperm(len(images), generator=generator(0, 0, Stream.SHARD))[: config.limit]
    return Images(images.levels[chosen], images.labels[chosen], images.full_scale, images.classes)


@lru_cache(maxsize=4)  # the workers of a simulation share one copy
def _load(name: str, data_dir: Path | None, train: bool, download: bool) -> Images:
    if name == "digits":
        return _digits(train)
    if data_dir is None:
        raise ConfigError(f"{name} needs --data-dir, the folder that holds it or that it is to be downloaded to")
    if not data_dir.is_dir():
        raise ConfigError(f"--data-dir {data_dir} is not a folder")
    vision = require("torchvision", "vision", f"reading {name}")
    if name == "folder":
        return _folder(vision, data_dir, "train" if train else "test")
    reader, place = {
        "mnist": (vision.datasets.MNIST, data_dir / "MNIST"),
        "cifar10": (vision.datasets.CIFAR10, data_dir / "cifar-10-batches-py"),
    }[name]
    there = place.exists()
    damaged = f"{name} in --data-dir {data_dir} is damaged; remove {place}, and --download fetches it again"
    try:
        dataset = reader(data_dir, train=train, download=download)
    except Exception as error:  # a damaged file raises whatever its bytes lead to
        if there:
            raise ConfigError(damaged) from None
        if download:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"{name} could not be downloaded to --data-dir {data_dir}: {reason}") from None
        raise ConfigError(f"{name} is not in --data-dir {data_dir}; --download fetches it there") from None
    levels, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
    if len(levels) == 0 or len(levels) != len(labels) or not 0 <= int(labels.min()) <= int(labels.max()) < 10:
        raise ConfigError(damaged)
    levels = levels[:, None] if name == "mnist" else levels.permute(0, 3, 1, 2).contiguous()
    return Images(levels, labels, 255, 10)


def _digits(train: bool) -> Images:
    """scikit-learn's 1,797 digits, 8 x 8 pixels of 17 levels; every sixth is a test digit."""
    digits = require("sklearn.datasets", "digits", "the digits dataset").load_digits()
    levels, labels = torch.as_tensor(digits.images).to(torch.uint8)[:, None], torch.as_tensor(digits.target)
    chosen = (torch.arange(len(labels)) % 6 != 5) == train
    return Images(levels[chosen], labels[chosen].to(torch.int64), 16, 10)


def _folder(vision: ModuleType, data_dir: Path, part: str) -> Images:
    root, classes = data_dir / part, _classes(data_dir / "train")
    if not root.is_dir():
        raise ConfigError(f"an image folder needs train/CLASS/* and test/CLASS/*, but {root} is not a folder")
    try:
        for path in root.iterdir():
            path.stat()  # torchvision overlooks classes that are dangling links
        dataset = vision.datasets.ImageFolder(root, transform=vision.transforms.PILToTensor(), loader=_open_image)
    except OSError as error:  # also torchvision's own, of a class without images
        raise ConfigError(f"image folder {root}: {str(error).splitlines()[0]}") from None
    if dataset.classes != classes:
        difference = ", ".join(sorted(set(dataset.classes) ^ set(classes)))
        raise ConfigError(
            f"train and test of image folder {data_dir} must have the same classes; only one has {difference}"
        )
    first = None if part == "train" else _load("folder", data_dir, True, False).shape
    images: list[Tensor] = []
    for (path, _), index in zip(dataset.samples, range(len(dataset)), strict=True):
        try:
            image = dataset[index][0]
        except ConfigError:
            raise
        except Exception:  # a damaged file raises whatever its bytes lead to
            raise ConfigError(f"{path} cannot be read as an image") from None
        first = first or image.shape
        if image.shape != first:
            raise ConfigError(f"images must be of one size, but {path} is {list(image.shape)}, not {list(first)}")
        images.append(image)
    return Images(torch.stack(images), torch.tensor(dataset.targets), 255, len(classes))


def _open_image(path: str) -> Any:
    """An image of three channels, as torchvision opens it, but for pixels of more than 8 bits, which it would clip."""
    from PIL import Image

    with open(path, "rb") as file, Image.open(file) as image:
        if image.mode[0] in "IF":
            raise ConfigError(f"{path} has pixels of more than 8 bits ({image.mode}); images must have 8 a channel")
        return image.convert("RGB")


def _classes(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir()) if root.is_dir() else []


def shard(data: Dataset, how: str, *, worker: int, workers: int, seed: int) -> Tensor:
    """Return the indices, int64, that this worker owns: an equal random share (iid), or its kind of examples (class:
    whole classes of images, a stretch of a text).

    Raises ConfigError if a worker would get nothing.
    """
    if how == "class":
        mine = (data.owners(workers) == worker).nonzero().squeeze(1)
    else:
        mine = torch.randperm(len(data), generator=generator(seed, 0, Stream.SHARD))[worker::workers]
    if len(mine) == 0:
        raise ConfigError(f"worker {worker} of {workers} gets no examples with data.shard = {how!r}; use fewer workers")
    return mine


class Batches:
    """This worker's batches, without replacement within a pass over its shard; batch t depends only on t.

    They begin at step `start` with what `rest` has, int64[m], if a pass that other workers began is to be ended, and
    then go on with this worker's own passes, from number `first`.
    """

    def __init__(
        self,
        indices: Tensor,
        batch_size: int,
        *,
        worker: int,
        seed: int,
        start: int = 0,
        rest: Tensor | None = None,
        first: int = 0,
    ) -> None:
        self._indices, self._batch_size, self._worker, self._seed = indices, batch_size, worker, seed
        self._start, self._first = start, first
        self._rest = indices[:0] if rest is None else rest
        self._epoch, self._order = -1, indices

    def __getitem__(self, step: int) -> Tensor:
        """Return the indices of the batch of a step, int64[batch_size]; a batch may straddle two passes."""
        picked = []
        position, missing = (step - self._start) * self._batch_size, self._batch_size
        while missing:
            part = self._from(position)[0][:missing]
            picked.append(part)
            position, missing = position + len(part), missing - len(part)
        return torch.cat(picked)

    def left(self, step: int) -> tuple[Tensor, int]:
        """Return what is left of the pass that is under way at a step, int64[m], and the number of the next one."""
        left, number = self._from((step - self._start) * self._batch_size)
        if number >= self._first and len(left) == len(self._indices):
            return left[:0], number
        return left, number + 1

    def _from(self, position: int) -> tuple[Tensor, int]:
        """What follows in a pass after so many examples, and the pass's number."""
        if position < len(self._rest):
            return self._rest[position:], self._first - 1
        number, offset = divmod(position - len(self._rest), len(self._indices))
        return self._pass(self._first + number)[offset:], self._first + number

    def _pass(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            rng = generator(self._seed, epoch, Stream.BATCH, worker=self._worker)
            self._epoch, self._order = epoch, self._indices[torch.randperm(len(self._indices), generator=rng)]
        return self._order


def deal(
    data: Dataset, how: str, batch_size: int, *, seed: int, history: History, workers: Iterable[int]
) -> list[Batches]:
    """Return the batches of some of the present workers, in a run whose number of workers changed as `history` says.

    What is left of passes that are under way then is dealt to the new workers by who owns which example, so that none
    is repeated and none dropped. Raises ConfigError if a worker would get nothing.
    """
    rest, first = torch.empty(0, dtype=torch.int64), 0
    for (start, size), (stop, _) in pairwise(history):
        every = [_begin(data, how, batch_size, w, size, seed, start, rest, first) for w in range(size)]
        left = [batches.left(stop) for batches in every]
        rest, first = torch.cat([part for part, _ in left]), max(number for _, number in left)
    start, size = history[-1]
    return [_begin(data, how, batch_size, w, size, seed, start, rest, first) for w in workers]


def _begin(
    data: Dataset, how: str, batch_size: int, worker: int, workers: int, seed: int, start: int, rest: Tensor, first: int
) -> Batches:
    mine = shard(data, how, worker=worker, workers=workers, seed=seed)
    own = mine[torch.isin(mine, rest)]
    rng = generator(seed, start, Stream.SHARD, worker=worker)
    own = own[torch.randperm(len(own), generator=rng)]
    return Batches(mine, batch_size, worker=worker, seed=seed, start=start, rest=own, first=first)
