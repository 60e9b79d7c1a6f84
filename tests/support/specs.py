"""Keyword arguments of tests that vary everything: those of `Compression` made one, and `lazy` part of the noise."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from packsaddle import Compression, Compressor, Noise, RandomK

_NAMES = {field.name for field in fields(Compression)}


def folded(options: Mapping[str, Any], default: Compressor = RandomK(0.01)) -> dict[str, Any]:  # noqa: B008 -- immutable
    """Return the options with `Compression`'s fields among them as one `compressor`, if none is given the default's."""
    options = dict(options)
    if "lazy" in options:
        options["noise"] = Noise(options["noise"], options.pop("lazy"))
    spec = {"compressor": default} | {name: value for name, value in options.items() if name in _NAMES}
    return {name: value for name, value in options.items() if name not in _NAMES} | {"compressor": Compression(**spec)}
