"""The texts of `lab.bench.nanogpt`: nanoGPT's characters, the source of Python's library, or a file of tokens."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lab.race.library import library_text

SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
LIBRARY = "library"  # the name of the second text
VOCABULARY = 50304  # GPT-2's 50,257 tokens, rounded up to a multiple of 64 as in nanoGPT
WINDOWS = 1742  # held-out windows of nanoGPT's text


@dataclass(frozen=True)
class Text:
    """A text as codes of its characters or tokens, integers [n]: its first nine tenths for training, its last tenth."""

    train: NDArray[Any]
    held_out: NDArray[Any]
    vocabulary: int
    digest: str = ""  # first 12 digits of the SHA-256

    @classmethod
    def read(cls, source: str) -> "Text":
        """Read nanoGPT's text from a file, or the source of Python's standard library if `source` is "library".

        Raises ValueError if the file has another text.
        """
        data = library_text().encode() if source == LIBRARY else Path(source).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if source != LIBRARY and digest != SHA256:
            raise ValueError(f"{source} must be tinyshakespeare, with the SHA-256 {SHA256}")
        text = data.decode()
        code = {character: i for i, character in enumerate(sorted(set(text)))}
        codes = np.array([code[character] for character in text])
        return cls(*_cut(codes), len(code), digest[:12])

    @classmethod
    def read_tokens(cls, path: Path) -> "Text":
        """Read GPT-2's tokens from a file in nanoGPT's format, uint16 without a header, such as its train.bin.

        The file is mapped into memory, not loaded. Raises ValueError if it has fewer than 20,000 tokens.
        """
        if path.stat().st_size < 40_000:
            raise ValueError(f"{path} must have at least 20,000 tokens of 2 bytes, got {path.stat().st_size:,} bytes")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(*_cut(np.memmap(path, np.uint16, "r")), VOCABULARY, digest[:12])

    def draw(self, windows: int, block: int, generator: torch.Generator) -> Tensor:
        """Return random windows of the training text, int64[windows, block + 1]."""
        return _windows(self.train, torch.randint(len(self.train) - block, (windows,), generator=generator), block)

    def last(self, block: int) -> Tensor:
        """Return held-out windows, int64[n, block + 1]: all of nanoGPT's text, evenly spaced ones of a longer text."""
        starts = torch.arange((len(self.held_out) - 1) // block) * block
        return _windows(self.held_out, starts[:: max(1, len(starts) // WINDOWS)], block)


def _cut(codes: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    cut = int(0.9 * len(codes))
    return codes[:cut], codes[cut:]


def _windows(codes: NDArray[Any], starts: Tensor, block: int) -> Tensor:
    index = starts[:, None] + torch.arange(block + 1)
    return torch.from_numpy(codes[index.numpy()].astype(np.int64))
