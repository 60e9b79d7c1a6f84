"""The texts of the race: nanoGPT's characters, the source of Python's standard library, or a file of tokens.

nanoGPT's text is https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt (1.1 MB).
The library is 718 modules of CPython 3.11.7, 10.9 million characters; `library/modules.txt` has their names. Two of
them are written when CPython is built and differ between machines, so they are in `library/generated.zip`; the others
are read from the running Python, or from the folder that the environment variable RACE_LIBRARY names. A SHA-256
ensures that all machines train on the same text.
"""

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from packsaddle.errors import ConfigError

SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # of tinyshakespeare
LIBRARY_SHA256 = "bdefb6a7856b43cb0b9bc25c1cd84a03f25a69095cd270f901ff120cab76cd0b"
VERSION = "3.11.7"
LIBRARY = "library"  # the name of the second text
VOCABULARY = 50304  # GPT-2's 50,257 tokens, rounded up to a multiple of 64 as in nanoGPT
WINDOWS = 1742  # held-out windows of nanoGPT's text
_STORED = Path(__file__).with_name("library")


@dataclass(frozen=True)
class Text:
    """A text as codes of its characters or tokens, integers [n]: its first nine tenths for training, its last tenth."""

    train: NDArray[Any]
    held_out: NDArray[Any]
    vocabulary: int
    digest: str = ""  # first 12 digits of the SHA-256

    @classmethod
    def read(cls, source: str) -> "Text":
        """Read nanoGPT's text from a file, the source of Python's standard library if `source` is "library", or
        GPT-2's tokens from a file whose name ends with .bin.

        Raises ConfigError if the file cannot be read or has another text.
        """
        if source.endswith(".bin"):
            return cls.read_tokens(Path(source))
        try:
            data = library_text().encode() if source == LIBRARY else Path(source).read_bytes()
        except OSError as error:
            raise ConfigError(f"text {source} cannot be read: {error.strerror}") from None
        digest = hashlib.sha256(data).hexdigest()
        if source != LIBRARY and digest != SHA256:
            raise ConfigError(
                f'text must be nanoGPT\'s input.txt (tinyshakespeare, SHA-256 {SHA256[:12]}), "{LIBRARY}" or a file of '
                f"tokens NAME.bin, got {source} with {digest[:12]}"
            )
        text = data.decode()
        code = {character: i for i, character in enumerate(sorted(set(text)))}
        codes = np.array([code[character] for character in text])
        return cls(*_cut(codes), len(code), digest[:12])

    @classmethod
    def read_tokens(cls, path: Path) -> "Text":
        """Read GPT-2's tokens from a file in nanoGPT's format, uint16 without a header, such as its train.bin.

        The file is mapped into memory, not loaded. Raises ConfigError if it has fewer than 20,000 tokens.
        """
        if not path.is_file() or path.stat().st_size < 40_000:
            found = f"{path.stat().st_size:,} bytes" if path.is_file() else "no file"
            raise ConfigError(f"{path} must have at least 20,000 tokens of 2 bytes, got {found}")
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


def library_text() -> str:
    """Return the source of all modules of Python's library, in the order of the hashes of their names.

    This order makes the last tenth, which is held out, similar to the rest. Raises ConfigError if a module is missing
    or the SHA-256 of the text is wrong.
    """
    folder = Path(os.environ.get("RACE_LIBRARY") or sysconfig.get_path("stdlib"))
    names = (_STORED / "modules.txt").read_text().split()
    with ZipFile(_STORED / "generated.zip") as generated:
        stored = {name: generated.read(name) for name in generated.namelist()}
    advice = (
        f"run Python {VERSION}, or set RACE_LIBRARY to the folder Lib of CPython's source of that version "
        "(tag v3.11.7 of github.com/python/cpython)"
    )

    # Assemble the text, and compare its hash with the expected one.
    in_order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    try:
        text = b"\n".join(stored.get(name) or (folder / name).read_bytes() for name in in_order)
    except OSError as error:
        raise ConfigError(f"{folder} has no module {error.filename}, which the race reads: {advice}") from None
    if (found := hashlib.sha256(text).hexdigest()) != LIBRARY_SHA256:
        raise ConfigError(
            f"{folder} must have the standard library of Python {VERSION}, whose text has the SHA-256 "
            f"{LIBRARY_SHA256[:12]}, got one with {found[:12]}: {advice}"
        )
    return text.decode("ascii")


def _cut(codes: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    cut = int(0.9 * len(codes))
    return codes[:cut], codes[cut:]


def _windows(codes: NDArray[Any], starts: Tensor, block: int) -> Tensor:
    index = starts[:, None] + torch.arange(block + 1)
    return torch.from_numpy(codes[index.numpy()].astype(np.int64))
