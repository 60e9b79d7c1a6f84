"""The text of the race: 718 modules of CPython 3.11.7's standard library, 10.9 million characters.

`library/modules.txt` has their names. Two of them are written when CPython is built and differ between machines, so
they are in `library/generated.zip`; the others are read from the running Python, or from the folder that the
environment variable RACE_LIBRARY names. A SHA-256 of the whole text ensures that all machines train on the same one.
"""

import hashlib
import os
import sysconfig
from functools import lru_cache
from pathlib import Path
from zipfile import ZipFile

from packsaddle.errors import ConfigError

VERSION = "3.11.7"
SHA256 = "bdefb6a7856b43cb0b9bc25c1cd84a03f25a69095cd270f901ff120cab76cd0b"
_STORED = Path(__file__).with_name("library")


@lru_cache(maxsize=1)
def library_text() -> str:
    """Return the race's text: the source of all modules, in the order of the hashes of their names.

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
    try:
        parts = [stored.get(name) or (folder / name).read_bytes() for name in sorted(names, key=_place)]
    except OSError as error:
        raise ConfigError(f"{folder} has no module {error.filename}, which the race reads: {advice}") from None
    text = b"\n".join(parts)
    if (found := hashlib.sha256(text).hexdigest()) != SHA256:
        raise ConfigError(
            f"{folder} must have the standard library of Python {VERSION}, whose text has the SHA-256 {SHA256[:12]}, "
            f"got one with {found[:12]}: {advice}"
        )
    return text.decode("ascii")


def _place(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
