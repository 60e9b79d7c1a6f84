"""Text in memory as codes of characters, read in windows; the reference of the Python language, or a folder's files."""

import importlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from packsaddle.errors import ConfigError, read_text
from packsaddle.runs.config import DataConfig

UNKNOWN = 0  # the code of every character outside the vocabulary
_MOST = 1024  # codes, the unknown one included
_LEAST = 5  # occurrences in the training text, below which a character is unknown
_CODE_POINTS = 0x110000


@dataclass(frozen=True)
class Text:
    """A text cut into windows: example i reads codes[i c : i c + c] and predicts codes[i c + 1 : i c + c + 1]."""

    codes: Tensor  # int16[n c + 1]
    context: int  # c, characters of a window
    vocabulary: str  # the character of code j is vocabulary[j - 1]; others are UNKNOWN

    def __len__(self) -> int:
        return (len(self.codes) - 1) // self.context

    @property
    def shape(self) -> torch.Size:
        """A window's shape, [c]."""
        return torch.Size((self.context,))

    @property
    def classes(self) -> int:
        """The number of codes."""
        return len(self.vocabulary) + 1

    def batch(self, index: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return windows and the characters that follow, both int64[b, c] (`dtype` is of real inputs, images')."""
        at = index[:, None] * self.context + torch.arange(self.context + 1)
        windows = self.codes[at].to(device, torch.int64)
        return windows[:, :-1], windows[:, 1:]

    def owners(self, workers: int) -> Tensor:
        """One stretch of the text after the other, equally long but for one window: int64[n]."""
        return torch.arange(len(self)) * workers // len(self)


def load_text(config: DataConfig, data_dir: Path | None, *, train: bool) -> Text:
    """Load all but the last tenth of a text, or the last tenth. Raises ConfigError that says what is wrong with it.

    `data.limit` keeps the first windows, so that they stay one stretch; the vocabulary is the whole training text's.
    """
    return cut_text(config, *_encoded(data_dir), data_dir or "pydoc_data.topics", train=train)


def cut_text(config: DataConfig, codes: Tensor, vocabulary: str, source: object, *, train: bool) -> Text:
    """Return all of a text but its last tenth, or that, in whole windows. Raises ConfigError if there is none.

    `codes` are in the `vocabulary`, `source` is the text's name in messages.
    """
    cut, c = len(codes) - len(codes) // 10, config.context
    part = codes[:cut] if train else codes[cut:]
    windows = (len(part) - 1) // c
    if windows < 1:
        raise ConfigError(
            f"{'training' if train else 'test'} text must have more than data.context = {c} characters, "
            f"got {len(part)} of the {len(codes)} in {source} (the last tenth is the test set)"
        )
    if train and config.limit is not None:
        if config.limit > windows:
            raise ConfigError(f"data.limit must be at most {windows} (the windows of the training text)")
        windows = config.limit
    return Text(part[: windows * c + 1], c, vocabulary)


@lru_cache(maxsize=4)  # the workers of a simulation share one copy
def _encoded(data_dir: Path | None) -> tuple[Tensor, str]:
    """The whole text's codes, int16[n], in the vocabulary of all but its last tenth."""
    text = _topics() if data_dir is None else _files(data_dir)
    if not text:
        raise ConfigError(f"the text in --data-dir {data_dir} is empty")
    return encode_text(text)


def encode_text(text: str) -> tuple[Tensor, str]:
    """Return a text's codes, int16[n], and their vocabulary, that of all but its last tenth."""
    # A code point per character; a table of every code point is a thousandth of a dictionary's time.
    points = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32)
    vocabulary = frequent(points[: len(points) - len(points) // 10])
    table = torch.zeros(_CODE_POINTS, dtype=torch.int16)
    table[vocabulary] = torch.arange(1, len(vocabulary) + 1, dtype=torch.int16)
    return table[points], "".join(map(chr, vocabulary.tolist()))


def frequent(points: Tensor) -> Tensor:
    """Return the code points of a vocabulary, int64, ascending: of those that are not rare the most frequent, and of
    equally frequent ones the lower."""
    count = torch.bincount(points, minlength=_CODE_POINTS)
    by_count = count.sort(descending=True, stable=True).indices[: _MOST - 1]
    return by_count[count[by_count] >= _LEAST].sort().values


def _topics() -> str:
    """The topics of pydoc's help: parts of the language reference that every CPython brings."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise ConfigError(
            "text without --data-dir is that of the module pydoc_data.topics, which this Python lacks; name a folder"
        ) from None
    return "\n".join(topics[name] for name in sorted(topics))


def _files(data_dir: Path) -> str:
    if not data_dir.is_dir():
        raise ConfigError(f"--data-dir {data_dir} is not a folder")
    files = sorted(p for p in data_dir.rglob("*") if p.suffix in (".txt", ".md") and p.is_file())
    if not files:
        raise ConfigError(f"--data-dir {data_dir} must hold *.txt or *.md files, in it or in its folders, but has none")
    return "\n".join(read_text(file, f"text file {file}") for file in files)
