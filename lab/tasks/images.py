"""Images in memory, and the `Dataset` protocol of images and text."""

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from packsaddle.errors import ConfigError, require
from packsaddle.numerics.seeds import Stream, generator


class Dataset(Protocol):
    """Interface of n examples in memory, each of which is an input with its target."""

    @property
    def shape(self) -> torch.Size:
        """Shape of one input."""

    @property
    def classes(self) -> int:
        """Number of classes, i.e. of possible values of a target."""

    def __len__(self) -> int: ...

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the examples `index`, int64[b]."""

    def owners(self, workers: int) -> Tensor:
        """Return the rank of the worker that owns each example, int64[n], if each owns some classes."""


@dataclass(frozen=True)
class Images:
    """Images with labels; pixels are levels / full_scale, in [0, 1]."""

    levels: Tensor  # levels of the pixels, uint8[n, channels, height, width]
    labels: Tensor  # class of each image, int64[n]
    full_scale: int
    classes: int

    def __len__(self) -> int:
        return len(self.levels)

    @property
    def shape(self) -> torch.Size:
        return self.levels.shape[1:]

    def owners(self, workers: int) -> Tensor:
        """Return the rank of the worker that owns each image, int64[n]: c mod W for an image of class c."""
        return self.labels % workers

    def pixels(self, index: Tensor) -> Tensor:
        return self.levels[index].to(torch.float32).div_(self.full_scale)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.pixels(index), self.labels[index]


def load_images(
    name: str, data_dir: Path | None = None, *, train: bool, limit: int | None = None, download: bool = False
) -> Images:
    """Load the training images, or with `train` False the test images, of a data set.

    `name` is digits, mnist, cifar10, or folder, which stands for images in train/CLASS/* and test/CLASS/*. `limit`
    selects this many training images. Raises ConfigError if the data are missing or damaged.
    """
    try:
        images = _load(name, data_dir, train, download)
    except OSError as error:
        raise ConfigError(f"--data-dir {data_dir} cannot be read: {error}") from None
    if limit is None or not train:
        return images
    if limit > len(images):
        raise ConfigError(f"limit must be at most {len(images)} (the examples of {name}), got {limit}")
    # Choose images at random, since image folders are sorted by class. The choice does not depend on the run's seed.
    chosen = torch.randperm(len(images), generator=generator(0, 0, Stream.SHARD))[:limit]
    return Images(images.levels[chosen], images.labels[chosen], images.full_scale, images.classes)


@lru_cache(maxsize=4)  # the workers of a simulation share one copy
def _load(name: str, data_dir: Path | None, train: bool, download: bool) -> Images:
    if name == "digits":
        return _digits(train)
    if data_dir is None:
        raise ConfigError(
            f"{name} needs --data-dir, the folder that contains the dataset, or to which --download downloads it"
        )
    if not data_dir.is_dir():
        raise ConfigError(f"--data-dir {data_dir} is not a folder")
    vision = require("torchvision", "vision", f"reading {name}")
    if name == "folder":
        return _folder(vision, data_dir, "train" if train else "test")
    reader, place = {
        "mnist": (vision.datasets.MNIST, data_dir / "MNIST"),
        "cifar10": (vision.datasets.CIFAR10, data_dir / "cifar-10-batches-py"),
    }[name]

    # If reading fails, the files are damaged if the folder exists, and otherwise missing.
    there = place.exists()
    damaged = f"{name} in --data-dir {data_dir} is damaged; remove {place}, and --download fetches it again"
    try:
        dataset = reader(data_dir, train=train, download=download)
    except Exception as error:  # a damaged file can raise anything
        if there:
            raise ConfigError(damaged) from None
        if download:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"{name} could not be downloaded to --data-dir {data_dir}: {reason}") from None
        raise ConfigError(f"{name} is not in --data-dir {data_dir}; add --download to download it there") from None

    # Check for damage that the reader does not detect: no images, or labels that do not match the images.
    levels, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
    if len(levels) == 0 or len(levels) != len(labels) or not 0 <= int(labels.min()) <= int(labels.max()) < 10:
        raise ConfigError(damaged)
    levels = levels[:, None] if name == "mnist" else levels.permute(0, 3, 1, 2).contiguous()
    return Images(levels, labels, 255, 10)


def _digits(train: bool) -> Images:
    """Load scikit-learn's 1,797 digits, which have 8 x 8 pixels with 17 levels. Every sixth digit is for tests."""
    # Read scikit-learn's data file directly if it is found, since importing scikit-learn takes each worker a second.
    library = find_spec("sklearn")
    file = Path(library.origin or "").parent / "datasets" / "data" / "digits.csv.gz" if library else None
    if file is not None and file.is_file():
        table = torch.from_numpy(np.loadtxt(file, delimiter=","))
        levels, labels = table[:, :64].reshape(-1, 1, 8, 8).to(torch.uint8), table[:, 64]
    else:
        digits = require("sklearn.datasets", "digits", "the digits dataset").load_digits()
        levels, labels = torch.as_tensor(digits.images).to(torch.uint8)[:, None], torch.as_tensor(digits.target)
    chosen = (torch.arange(len(labels)) % 6 != 5) == train
    return Images(levels[chosen], labels[chosen].to(torch.int64), 16, 10)


def _folder(vision: ModuleType, data_dir: Path, part: str) -> Images:
    root, train = data_dir / part, data_dir / "train"
    classes = sorted(p.name for p in train.iterdir() if p.is_dir()) if train.is_dir() else []
    if not root.is_dir():
        raise ConfigError(f"an image folder needs train/CLASS/* and test/CLASS/*, but {root} is not a folder")
    try:
        for path in root.iterdir():
            path.stat()  # raises for dangling links, which torchvision ignores
        dataset = vision.datasets.ImageFolder(root, transform=vision.transforms.PILToTensor(), loader=_open_image)
    except OSError as error:  # torchvision raises FileNotFoundError for a class without images
        raise ConfigError(f"image folder {root}: {str(error).splitlines()[0]}") from None
    if dataset.classes != classes:
        difference = ", ".join(sorted(set(dataset.classes) ^ set(classes)))
        raise ConfigError(
            f"train and test of image folder {data_dir} must have the same classes; only one has {difference}"
        )

    # Test images must have the shape of the training images.
    first = None if part == "train" else _load("folder", data_dir, True, False).shape
    images: list[Tensor] = []
    for (path, _), index in zip(dataset.samples, range(len(dataset)), strict=True):
        try:
            image = dataset[index][0]
        except ConfigError:
            raise
        except Exception:  # a damaged file can raise anything
            raise ConfigError(f"{path} cannot be read as an image") from None
        first = first or image.shape
        if image.shape != first:
            raise ConfigError(f"images must be of one size, but {path} is {list(image.shape)}, not {list(first)}")
        images.append(image)
    return Images(torch.stack(images), torch.tensor(dataset.targets), 255, len(classes))


def _open_image(path: str) -> Any:
    """Open an image as RGB, like torchvision.

    Raises ConfigError if a channel has more than 8 bits, since torchvision would clip such values.
    """
    from PIL import Image

    with open(path, "rb") as file, Image.open(file) as image:
        if image.mode[0] in "IF":
            raise ConfigError(f"{path} has pixels of more than 8 bits ({image.mode}); images must have 8 a channel")
        return image.convert("RGB")
