"""Search for messages that hurt a receiver, guided by the branches that each reaches (needs `pip install atheris`).

    NUMBA_DISABLE_JIT=1 python -m lab.bench.fuzz_coverage corpus/ [libFuzzer's options, such as -max_total_time=3600]

libFuzzer changes the bytes of genuine messages and keeps those that execute a new branch of the decoders, which run as
Python here: an index that is out of bounds raises IndexError. A message passes as in `fuzz_messages.py`, by a vector or
MessageError. Anything else ends the run; its input is kept as a file, and `python -m lab.bench.fuzz_coverage FILE`
decodes it again.
"""

import sys
import warnings
from itertools import islice
from pathlib import Path

import atheris
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "tests" / "support")]
with atheris.instrument_imports(include=["packsaddle.compressors", "packsaddle.numerics"]):
    from corruption import SETTINGS
    from fuzz_messages import messages
    from mutations import Part, Parts, outcome

LENGTHS = (17, 64, 100, 257, 300)
_SEEDS = 3  # vectors whose messages begin the corpus


def lengths(setting: int) -> list[int]:
    """Return the lengths d of vectors that a compressor accepts."""
    return [n for n in LENGTHS if n >= (getattr(SETTINGS[setting], "k", None) or 1)]


def genuine(setting: int, d: int) -> list[Parts]:
    return messages(SETTINGS[setting], d, torch.Generator().manual_seed(0))


def written(setting: int, which: int, parts: Parts) -> bytes:
    """Return an input: a compressor, a length d, and each part behind its number of bytes."""
    return bytes([setting, which]) + b"".join(len(p.content).to_bytes(2, "big") + p.content for p in parts.values())


def read(data: bytes, like: Parts) -> Parts:
    """Return the message of an input; parts beyond its end are empty."""
    parts, at = {}, 2
    for name, part in like.items():
        end = at + 2 + int.from_bytes(data[at : at + 2], "big")
        parts[name], at = Part(part.dtype, data[at + 2 : end]), end
    return parts


class Target:
    """Decodes an input; counts messages by outcome."""

    def __init__(self) -> None:
        self.likes: dict[tuple[int, int], Parts] = {}
        self.counts: dict[str, int] = {}

    def __call__(self, data: bytes) -> None:
        if len(data) < 2:
            return
        setting = data[0] % len(SETTINGS)
        possible = lengths(setting)
        d = possible[data[1] % len(possible)]
        like = self.likes.get((setting, d)) or self.likes.setdefault((setting, d), genuine(setting, d)[0])
        found = outcome(SETTINGS[setting], read(data, like), torch.zeros(d), thorough=True)
        self.counts[found] = self.counts.get(found, 0) + 1
        if (total := sum(self.counts.values())) % 100_000 == 0:
            print(f"{total:,} messages: {self.counts}", flush=True)


def write_corpus(folder: Path) -> None:
    """Write genuine messages of every compressor and length, unless the folder has files."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        return
    for setting in range(len(SETTINGS)):
        for which, d in enumerate(lengths(setting)):
            for i, parts in enumerate(islice(genuine(setting, d), _SEEDS)):
                (folder / f"{setting}-{d}-{i}").write_bytes(written(setting, which, parts))


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(str(__doc__))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if not Path(sys.argv[1]).is_file():
        write_corpus(Path(sys.argv[1]))
    atheris.Setup([*sys.argv, "-max_len=4096", "-timeout=60", "-rss_limit_mb=6000"], Target())
    atheris.Fuzz()


if __name__ == "__main__":
    main()
