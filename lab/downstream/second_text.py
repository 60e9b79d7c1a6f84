"""The second text: the reference of the Python language, in the alphabet of the pretraining text.

It is English prose with examples in Python, 0.46 million characters from the pydoc of CPython. Its characters have the
codes of the pretraining text; characters outside that alphabet, such as typographic quotes, are removed.
"""

import hashlib
from functools import cache

import torch
from torch import Tensor

from lab.race.library import VERSION
from lab.race.workload import load_library
from lab.runs import DataConfig
from lab.runs.tasks import Text, load_data
from packsaddle.errors import ConfigError

SHA256 = "66e8ae08c9c8eca4c0858a21de30df37010fc87df3469f064dfab14d95e612ae"
CONFIG = DataConfig("text")


@cache
def second_text() -> tuple[Text, Text]:
    """Return the training part and the last tenth of the text. Raises ConfigError if it is another text."""
    alphabet = load_library(CONFIG, train=True).vocabulary
    parts = []
    for train in (True, False):
        part = load_data(CONFIG, None, train=train)
        assert isinstance(part, Text)
        codes = translate(part.codes, part.vocabulary, alphabet)
        parts.append(Text(codes[: (len(codes) - 1) // part.context * part.context + 1], part.context, alphabet))
    digits = hashlib.sha256(b"".join(part.codes.numpy().tobytes() for part in parts)).hexdigest()
    if digits != SHA256:
        raise ConfigError(
            f"the language reference must be that of Python {VERSION}, with the SHA-256 {SHA256[:12]}, got one with "
            f"{digits[:12]}: run Python {VERSION}"
        )
    return parts[0], parts[1]


def translate(codes: Tensor, vocabulary: str, alphabet: str) -> Tensor:
    """Return codes of `vocabulary` as codes of `alphabet`, without the characters that it does not have."""
    table = torch.tensor([0, *(alphabet.find(character) + 1 for character in vocabulary)], dtype=codes.dtype)
    translated = table[codes.long()]
    return translated[translated > 0]
