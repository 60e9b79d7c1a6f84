"""Keyword arguments of tests that vary everything, flat, as the options of which they are fields."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from packsaddle import Compression, Compressor, Noise, OuterAgreement, Overlap, RandomK, Sign, Workers

_OF_COMPRESSION = {field.name for field in fields(Compression)}


def folded(options: Mapping[str, Any], default: Compressor = RandomK(0.01)) -> dict[str, Any]:  # noqa: B008 -- immutable
    """Return the options with `Compression`'s fields as one `compressor`, if none is given the default's.

    Likewise `lazy` is part of the noise, `agreement` of the outer step, and the fields of `Overlap` and `Workers` make
    `overlap` and `workers`.
    """
    options = dict(options)
    if "lazy" in options:
        options["noise"] = Noise(options["noise"], options.pop("lazy"))
    if p := options.pop("agreement", 0.0):
        options["outer"] = OuterAgreement(p, options.get("outer"))
    for name, cls in (("overlap", Overlap), ("workers", Workers)):
        of = {f.name for f in fields(cls)} & options.keys()
        if of:
            options[name] = cls(**{key: options.pop(key) for key in of})
    spec = {"compressor": default} | {name: options.pop(name) for name in _OF_COMPRESSION & options.keys()}
    given = spec.pop("compressor")
    if not isinstance(given, Compression):
        options["compressor"] = Compression(given, **spec)
    else:
        options["compressor"] = replace(given, **spec)
    return options


def local_options(**options: Any) -> dict[str, Any]:
    """Return the options of local updates, flat, as `folded` does."""
    return folded(options, Sign(per_tensor=True))
