"""Text in memory as character codes, cut into windows: Python's language reference, or the files of a folder."""

import importlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from packsaddle.errors import ConfigError, read_text

UNKNOWN = 0  # the code of every character outside the vocabulary
_MOST = 1024  # maximum number of codes, including UNKNOWN
_LEAST = 5  # a character needs this number of occurrences in the training text to have its own code
_CODE_POINTS = 0x110000


@dataclass(frozen=True)
class Text:
    """A text cut into windows: example i reads codes[i c : i c + c] and predicts codes[i c + 1 : i c + c + 1]."""

    codes: Tensor  # codes of the characters, int16[n c + 1]
    context: int  # c, characters of a window
    vocabulary: str  # vocabulary[j - 1] is the character with the code j; all remaining characters have UNKNOWN

    def __len__(self) -> int:
        return (len(self.codes) - 1) // self.context

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.context,))

    @property
    def classes(self) -> int:
        """Number of classes to predict: the characters of the vocabulary, and one class for all others."""
        return len(self.vocabulary) + 1

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the windows `index`, and the character that follows each position, both int64[b, c]."""
        windows = self.codes[index[:, None] * self.context + torch.arange(self.context + 1)].to(torch.int64)
        return windows[:, :-1], windows[:, 1:]

    def owners(self, workers: int) -> Tensor:
        """Return the rank of the worker that owns each window, int64[n].

        Each worker owns a consecutive part of the text. The parts' sizes differ by at most one window.
        """
        return torch.arange(len(self)) * workers // len(self)


def load_text(data_dir: Path | None = None, *, train: bool, context: int = 64, limit: int | None = None) -> Text:
    """Load the training text, or with `train` False the held-out text, which is the last tenth.

    The text is that of all .txt and .md files in `data_dir`, by default Python's own language reference. `limit`
    selects the first windows of the training text. Raises ConfigError if the text is missing or too short.
    """
    codes, vocabulary = _encoded(data_dir)
    source = data_dir or "pydoc_data.topics"
    return cut_text(codes, vocabulary, source, train=train, context=context, limit=limit)


def cut_text(
    codes: Tensor, vocabulary: str, source: object, *, train: bool, context: int = 64, limit: int | None = None
) -> Text:
    """Cut a text into windows, and return its first nine tenths, or with `train` False its last tenth.

    `codes` are the codes of the whole text, int16[n]; `source` is its name in messages. Raises ConfigError if not even
    one window fits.
    """
    cut = len(codes) - len(codes) // 10
    part = codes[:cut] if train else codes[cut:]
    windows = (len(part) - 1) // context
    if windows < 1:
        raise ConfigError(
            f"{'training' if train else 'test'} text must have more than context = {context} characters, "
            f"got {len(part)} of the {len(codes)} in {source} (the last tenth is the test set)"
        )
    if train and limit is not None:
        if limit > windows:
            raise ConfigError(f"limit must be at most {windows} (the windows of the training text), got {limit}")
        windows = limit
    return Text(part[: windows * context + 1], context, vocabulary)


@lru_cache(maxsize=4)  # the workers of a simulation share one copy
def _encoded(data_dir: Path | None) -> tuple[Tensor, str]:
    """Return the codes of the whole text, int16[n], and the vocabulary of its first nine tenths."""
    if data_dir is None:
        # The topics of pydoc's help are the parts of the language reference that CPython includes.
        try:
            topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        except ImportError:
            raise ConfigError(
                "text without --data-dir is read from the module pydoc_data.topics, which is missing in this Python; "
                "set --data-dir"
            ) from None
        return encode_text("\n".join(topics[name] for name in sorted(topics)))
    if not data_dir.is_dir():
        raise ConfigError(f"--data-dir {data_dir} is not a folder")
    files = sorted(p for p in data_dir.rglob("*") if p.suffix in (".txt", ".md") and p.is_file())
    if not files:
        raise ConfigError(f"--data-dir {data_dir} must contain *.txt or *.md files, also in subfolders, but has none")
    text = "\n".join(read_text(file, f"text file {file}") for file in files)
    if not text:
        raise ConfigError(f"the text in --data-dir {data_dir} is empty")
    return encode_text(text)


def encode_text(text: str) -> tuple[Tensor, str]:
    """Return the codes of a text, int16[n], and the vocabulary of its first nine tenths."""
    points = torch.frombuffer(bytearray(text.encode("utf-32-le")), dtype=torch.int32)
    # The vocabulary is the most frequent code points, in ascending order; ties go to the lower code point.
    count = torch.bincount(points[: len(points) - len(points) // 10], minlength=_CODE_POINTS)
    by_count = count.sort(descending=True, stable=True).indices[: _MOST - 1]
    vocabulary = by_count[count[by_count] >= _LEAST].sort().values

    # Encode with a table of all code points, which is 1,000 times as fast as a dictionary.
    table = torch.zeros(_CODE_POINTS, dtype=torch.int16)
    table[vocabulary] = torch.arange(1, len(vocabulary) + 1, dtype=torch.int16)
    return table[points], "".join(map(chr, vocabulary.tolist()))
