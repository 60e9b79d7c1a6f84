"""Certificate, spectral density and norm of pretrained models, on the same windows of the pretraining text for all."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import packsaddle
from lab.bench.origin import Origin
from lab.bench.rows_file import add_rows, read_rows
from lab.downstream.finetune import network_of
from lab.downstream.pretrain import Run
from lab.race.workload import LIBRARY, evenly_spaced, load_library
from lab.runs import DataConfig
from lab.runs.tasks import task_loss
from packsaddle.curvature import spectral_density

WINDOWS = 32
PROBES, PRODUCTS = 2, 16  # probe vectors of the density, products of each
TOLERANCE = 0.3  # relative residual of the direction of lambda_min


@dataclass(frozen=True)
class Curvature:
    """A point's gradient and Hessian, on `WINDOWS` windows of the training text."""

    run: Run
    grad_norm: float
    lambda_min: float  # upper bound: a Rayleigh quotient
    lambda_max: float  # lower bound: the largest Ritz value
    trace: float
    second_moment: float  # mean of the squares of the eigenvalues
    weight_norm: float  # norm of all parameters

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Curvature":
        names = ("grad_norm", "lambda_min_upper", "lambda_max_lower", "trace", "second_moment", "weight_norm")
        return cls(Run.of_row(row), *(float(row[name]) for name in names))


def measure(run: Run, rows: Path, folder: Path) -> None:
    """Certify the pretrained model and estimate its spectral density, with the same random vectors for all models."""
    if run in [found.run for found in read_rows(rows, Curvature.of_row, "certificate")]:
        return
    network, batches = network_of(run, folder), windows()
    search = packsaddle.Search(max_hvps=40, tolerance=TOLERANCE, generator=torch.Generator().manual_seed(0))
    certificate = packsaddle.certify(network, task_loss, batches, search=search)
    search = packsaddle.Search(generator=torch.Generator().manual_seed(1))
    density = spectral_density(network, task_loss, batches, probes=PROBES, steps=PRODUCTS, search=search)

    # Moments of the quadrature, exact for polynomials of degree below twice the number of products.
    moments = [
        sum(theta**2 * weight for theta, weight in zip(*pair, strict=True))
        for pair in zip(density.nodes, density.weights, strict=True)
    ]
    below = density.share_below(0.0)
    row = {
        "loss": certificate.loss,
        "grad_norm": certificate.grad_norm,
        "verdict": str(certificate.verdict),
        "lambda_min_lower": certificate.lambda_min_lower,
        "lambda_min_upper": min(certificate.lambda_min_upper, *(nodes[0] for nodes in density.nodes)),
        "lambda_max_lower": max(certificate.lambda_max_lower, *(nodes[-1] for nodes in density.nodes)),
        "trace": density.trace.mean,
        "trace_error": density.trace.error,
        "second_moment": sum(moments) / len(moments),
        "below_zero_least": below[0].mean,
        "below_zero_most": below[1].mean,
        "weight_norm": float(torch.cat([p.detach().flatten() for p in network.parameters()]).norm()),
        "products": certificate.hvps + density.hvps,
        "seconds": certificate.seconds,
    }
    rounded = {name: float(f"{x:.5g}") if isinstance(x, float) else x for name, x in row.items()}
    add_rows(rows, [asdict(run) | rounded | asdict(Origin.here(text=LIBRARY))])
    print(asdict(run) | rounded, flush=True)


def windows() -> list[tuple[Tensor, Tensor]]:
    """Return the windows as one batch: evenly spaced in the training text, so that every model saw their sources."""
    text = load_library(DataConfig("text"), train=True)
    return [text.batch(evenly_spaced(len(text), WINDOWS), torch.device("cpu"))]
