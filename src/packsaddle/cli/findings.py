"""Certification of the weights in a file as a saddle or a second-order stationary point, and the options of the
certification."""

import json
import math
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from packsaddle.checkpoint.atomic_files import write_whole
from packsaddle.cli.certificate_figure import draw_certificate, save
from packsaddle.cli.folders import written
from packsaddle.comm.communicator import Communicator
from packsaddle.comm.group import resolve
from packsaddle.comm.ledger import Ledger
from packsaddle.curvature.certificate import Certificate
from packsaddle.curvature.certify import certify
from packsaddle.curvature.mean_loss import LossFn
from packsaddle.curvature.sharded import mean_loss_of
from packsaddle.errors import ConfigError
from packsaddle.messages import first_line

_POINTS = 20  # number of losses that a loss profile has on each side of the parameters x
_PROFILED = 4096  # approximate number of examples in each of the 41 losses of a profile; using all would take long


@dataclass(frozen=True)
class Profile:
    """The loss along a direction v from the parameters x: f(x + s v) at several distances s."""

    distances: tuple[float, ...]  # distances s along v
    losses: tuple[float | None, ...]  # losses f(x + s v); None: non-finite
    examples: int  # number of examples in the mean loss


@dataclass(frozen=True)
class Finding:
    """The results of certifying the parameters in one file of weights, i.e. of deciding if they are a saddle or
    second-order stationary."""

    file: Path  # file of the weights
    certificate: Certificate
    profile: Profile | None  # loss along the escape direction; None: no direction was found
    sharpest: Profile | None  # loss along the sharpest direction; None: that direction is unknown

    def to_dict(self) -> dict[str, Any]:
        return {
            "file": str(self.file),
            **self.certificate.to_dict(),
            "profile": None if self.profile is None else asdict(self.profile),
            "sharpest_profile": None if self.sharpest is None else asdict(self.sharpest),
        }

    def __str__(self) -> str:
        return f"{self.file}: {self.certificate}"


def finding(file: Path, model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], **options: Any) -> Finding:
    """Certify the model's parameters, i.e. decide if they are a saddle or second-order stationary, and evaluate the
    loss along the directions of least and of largest curvature; collective.

    Args:
        file: the file of the model's weights, which is not read.
        model, loss_fn, batches, options: see `packsaddle.certify`.
    """
    certificate = certify(model, loss_fn, batches, **options)

    # Evaluate the loss along the directions of least and of largest curvature, v and w, up to twice the escape
    # distance, or up to 1 if there is none.
    v, w = certificate.escape_direction, certificate.sharpest_direction
    some = list(islice(batches, 0, None, max(1, certificate.examples // _PROFILED)))
    reach = 2 * abs(certificate.escape_distance or 0.5)
    escape = None if v is None else _profile(model, loss_fn, some, v, reach)
    sharpest = None if w is None else _profile(model, loss_fn, some, w, reach)
    return Finding(file, certificate, escape, sharpest)


def _profile(model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], direction: Tensor, reach: float) -> Profile:
    mean = mean_loss_of(model, loss_fn, batches, Communicator(resolve(None), Ledger()))
    direction = direction.to(mean.device)
    distances = [reach * i / _POINTS for i in range(-_POINTS, _POINTS + 1)]
    losses = [mean.loss_at(direction, s) for s in distances]
    finite = tuple(loss if math.isfinite(loss) else None for loss in losses)
    return Profile(tuple(distances), finite, mean.examples)


def read_weights(file: Path) -> Any:
    try:
        # Ignore warnings about the file's format, since errors mention the format too.
        with warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"checkpoint {file} does not exist") from None
    except OSError as error:
        raise ConfigError(f"checkpoint {file} cannot be read: {first_line(error)}") from None
    except Exception:  # torch's message for a pickled object advises to run the file's code
        raise ConfigError(
            f"checkpoint {file} cannot be read: it is damaged, or contains more than tensors and plain types, such as "
            f"a whole model: save model.state_dict()"
        ) from None


def write(found: Finding, folder: Path) -> None:
    """Write the finding to the folder as certificates.json. If it has a direction of least curvature, also write a
    plot, and the directions of least and largest curvature. Raises ConfigError if a file cannot be written."""
    point = found.to_dict()
    text = json.dumps({"points": [point]}, indent=2).encode() + b"\n"
    certificate = found.certificate
    with written(folder):
        write_whole(folder / "certificates.json", lambda file: file.write(text))
        if certificate.escape_direction is None:
            return
        directions = {"escape_direction": certificate.escape_direction}
        if certificate.sharpest_direction is not None:
            directions["sharpest_direction"] = certificate.sharpest_direction
        write_whole(folder / "certificate.direction.pt", partial(torch.save, directions))
        save(draw_certificate(point), folder, "certificate")
