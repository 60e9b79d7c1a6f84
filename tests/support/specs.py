"""Conversion of flat keyword arguments, in which tests vary all settings, to the nested options of the library."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from packsaddle import Compression, Compressor, Noise, OuterAgreement, Overlap, RandomK, Sign, Workers

_OF_COMPRESSION = {field.name for field in fields(Compression)}


def folded(options: Mapping[str, Any], default: Compressor = RandomK(0.01)) -> dict[str, Any]:  # noqa: B008 -- immutable
    """Return options in which the fields of `Compression` are replaced by one option `compressor`.

    If there is no compressor, it is `default`. Likewise `lazy` becomes a part of the noise, `agreement` a part of the
    outer step, and the fields of `Overlap` and `Workers` become the options `overlap` and `workers`.
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
    """Convert the flat options of local updates to nested ones, as `folded` does."""
    return folded(options, Sign(per_tensor=True))
