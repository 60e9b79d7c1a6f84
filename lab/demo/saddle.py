"""The demo's first part: a deep autoencoder on scikit-learn's digits starts near a saddle, and noise leaves it."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from lab.demo.story import Story
from lab.pool import Report
from lab.tasks.images import load_images
from lab.tasks.models import autoencoder
from lab.tasks.sharding import Batches, shard
from packsaddle import CompressedSGD, Ramp, RandomK, Search, TopK, certify, simulate
from packsaddle.compressors import Compressor, Identity

WORKERS, BATCH, LR = 2, 16, 1.0
NOISE = 0.003  # standard deviation of the artificial noise in each coordinate of the gradient
EVERY = 23  # steps between two measurements: half an epoch
# The loss of the best constant output, i.e. the mean variance of a pixel of the training digits. A run has left the
# saddle when its loss is 5% below.
PLATEAU, BELOW = 0.0735, 0.95


@dataclass(frozen=True)
class Method:
    """One of the four runs."""

    name: str
    compressor: Compressor
    noise: float
    epochs: float
    seed: int

    def __str__(self) -> str:
        return self.name


def methods(epochs: float, seed: int) -> list[Method]:
    """Return the four runs, of which only the first has no noise."""
    return [
        Method("uncompressed, no noise", Identity(), 0.0, epochs, seed),
        Method("uncompressed, noise", Identity(), NOISE, epochs, seed),
        Method("RandomK 1%, noise", RandomK(0.01), NOISE, epochs, seed),
        Method("TopK 1%, noise", TopK(0.01), NOISE, epochs, seed),
    ]


@dataclass(frozen=True)
class Run:
    """What was measured in one run."""

    method: Method
    epochs: list[float]
    losses: list[float]  # mean training losses since the previous measurement
    megabytes: float  # sent by each worker
    verdict: str  # the certificate of the last point
    curvature: tuple[float, float]  # bounds on the smallest eigenvalue of the Hessian at the last point

    @property
    def left(self) -> float | None:
        """The epoch at which the loss has fallen below the plateau; None if it has not."""
        return next(
            (epoch for epoch, loss in zip(self.epochs, self.losses, strict=True) if loss < BELOW * PLATEAU), None
        )


def train(method: Method, report: Report) -> Run:
    """Train with two workers, which are simulated in this process, and certify the last point."""
    return simulate(lambda rank: _train(method, rank, report), WORKERS)[0]


def _train(method: Method, rank: int, report: Report) -> Run:
    # Each worker has one half of the images. All start with the same weights.
    images = load_images("digits", train=True)
    mine = shard(images, "iid", worker=rank, workers=WORKERS, seed=method.seed)
    batches = Batches(mine, BATCH, worker=rank, seed=method.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(method.seed)
        model = autoencoder(images.shape, (256, 128, 64, 32, 10))

    # The noise is lowered from 60% to 85% of the steps, so that the loss can settle.
    per_epoch = len(images) // (BATCH * WORKERS)
    steps = max(1, round(method.epochs * per_epoch))
    noise = Ramp(method.noise, round(0.6 * steps), round(0.85 * steps))
    optimizer = CompressedSGD(model.named_parameters(), LR, method.compressor, noise=noise, seed=method.seed)

    losses, since = Run(method, [], [], 0.0, "", (-inf, inf)), torch.zeros(1)
    for step in range(steps):
        optimizer.zero_grad()
        pixels = images.pixels(batches[step])
        loss = nn.functional.mse_loss(model(pixels), pixels)
        torch.autograd.backward(loss)
        optimizer.step()
        since += loss.detach()
        if (step + 1) % EVERY == 0:
            losses.epochs.append((step + 1) / per_epoch)
            losses.losses.append(float(since) / EVERY)
            since.zero_()
            report((step + 1) / steps)

    # Is the last point a saddle? The certificate bounds the Hessian's smallest eigenvalue there.
    part = [images.pixels(mine[:512]).double()]
    search = Search(max_hvps=100, tolerance=0.1, generator=torch.Generator().manual_seed(method.seed))
    found = certify(model.double(), reconstruction, part, search=search, progress=False)
    sent = optimizer.ledger.sent / 1e6
    bounds = (found.lambda_min_lower, found.lambda_min_upper)
    return Run(method, losses.epochs, losses.losses, sent, str(found.verdict), bounds)


def reconstruction(model: nn.Module, pixels: Tensor) -> Tensor:
    return nn.functional.mse_loss(model(pixels), pixels)


def story(runs: Sequence[Run]) -> Story:
    """Return the page on the four runs. Its sentences say so if they do not show the escape."""
    without, *noisy = runs
    left = [run.left for run in noisy if run.left is not None]
    escaped = without.left is None and len(left) == len(noisy)
    fewer = noisy[0].megabytes / max(run.megabytes for run in noisy[1:])
    low, high = without.curvature

    # The result, or what the runs show instead.
    if escaped:
        result = (
            f"Without noise, SGD stays at the saddle to the end; with a little noise it leaves in epoch "
            f"{min(left):.0f} to {max(left):.0f}, even when it sends {fewer:.0f} times fewer bytes."
        )
    else:
        result = (
            f"In these {without.epochs[-1] if without.epochs else 0:.0f} epochs {len(left)} of {len(noisy)} runs with "
            f"noise left the saddle, and SGD without noise {'did not' if without.left is None else 'did too'}."
        )
    happened = (
        f"At first every output is the same gray image: a loss of {PLATEAU}, where the gradient is nearly zero.",
        "A certificate of the last point without noise finds negative curvature, so it is not a minimum: the Hessian's "
        f"smallest eigenvalue is between {low:.2g} and {high:.2g}."
        if high < 0
        else "A certificate of the last point without noise cannot show that its curvature is negative.",
        f"Noise of {NOISE} per coordinate pushes SGD along that curvature. It does so with RandomK and TopK too, "
        "although they send only 1% of the coordinates in a step, because the error memory keeps the rest for later.",
    )

    def draw(axes: Any, narrow: bool) -> None:
        axes.axhline(PLATEAU, color="#b0b0b0", linewidth=1, linestyle=":")
        styles = (("#D55E00", "--"), ("#0072B2", "-"), ("#009E73", "-"), ("#CC79A7", "-"))
        for run, (color, style) in zip(runs, styles, strict=True):
            axes.plot(run.epochs, run.losses, color=color, linestyle=style, label=run.method.name)
        if without.epochs and high < 0:
            at = without.epochs[-1], without.losses[-1]
            axes.plot(*at, "v", color="#D55E00", markersize=9, clip_on=False)
            text = f"certified: curvature {high:.1g}" if narrow else f"certified: negative curvature, {high:.2g}"
            axes.annotate(text, at, (0, 12), textcoords="offset points", ha="right", color="#D55E00")
        axes.set(xlabel="epochs", ylabel="training loss", xlim=(0, None), ylim=(0, PLATEAU * 1.22))
        axes.legend(loc="lower left")

    return Story(
        title="A saddle, and noise that leaves it",
        result=result,
        draw=draw,
        caption="Training loss of a deep autoencoder on scikit-learn's digits, with two workers and one seed. The "
        "dotted line is the saddle's loss.",
        happened=happened,
        code="optimizer = packsaddle.CompressedSGD(\n"
        f"    model.parameters(), lr={LR}, compressor=packsaddle.TopK(0.01), noise={NOISE}\n"
        ")\n"
        "packsaddle.certify(model, loss_fn, batches)  # is this point a saddle?",
        headings=("run", "last loss", "left the saddle", "MB sent per worker", "smallest eigenvalue in"),
        rows=[
            (
                run.method.name,
                f"{run.losses[-1]:.4f}" if run.losses else "none",
                "no" if run.left is None else f"epoch {run.left:.0f}",
                f"{run.megabytes:,.1f}",
                f"[{run.curvature[0]:.1e}, {run.curvature[1]:.1e}]",
            )
            for run in runs
        ],
        details=(
            f"A fully connected autoencoder (64-256-128-64-32-10 and back, ReLU) by CompressedSGD, step size {LR}, two "
            f"simulated workers with batches of {BATCH}. The noise is lowered to zero from 60% to 85% of the steps.",
            "experiments/figure2 has the paper's own figure, with ten seeds: noise shortens the stay, and with another "
            "output layer it raises the final loss. docs/certificates.md explains the bounds.",
        ),
    )
