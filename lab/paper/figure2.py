"""The paper's Figure 2: in training the MNIST autoencoder, noise shortens the time spent near a saddle.

    python -m lab.paper.figure2 --data-dir DIR --out fig2        # three compressors, with and without noise
    python -m lab.paper.figure2 open --data-dir DIR              # details that the paper leaves open
    python -m lab.paper.figure2 compressors --data-dir DIR       # nine compressors
    python -m lab.paper.figure2 k --data-dir DIR                 # TopK and RandomK, from 10% to 0.03%
    python -m lab.paper.figure2 escape --data-dir DIR            # Algorithm 1's escape check, on and off
    python -m lab.paper.figure2 --data-dir DIR --compressor 'TopK(0.01)' --noise 0 0.003 --seeds 1     # yours

`train` is one run. The settings of each study are in `STUDIES`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import sub, truediv
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lab.paper import drawing
from lab.paper.results import Curve, Json, by_setting, finish, interval, lowest_at, paired
from lab.paper.study import NINE, Measurements, Options, Row, Run, Scale, do_runs
from lab.pool import Report
from lab.tasks.images import Images, load_images
from lab.tasks.models import mnist_autoencoder, seeded
from lab.tasks.sharding import Batches, shard
from packsaddle import CompressedSGD, Compression, Escape, Ramp, Search, certify
from packsaddle.cli import serve
from packsaddle.compressors import Compressor, Identity, RandomK, TopK, describe, parse_compressor
from packsaddle.curvature.mean_loss import NotFiniteError
from packsaddle.numerics import Stream, generator

LR, BATCH, SIGMA = 0.1, 64, 0.01
# The loss if every output pixel has the same, best gray value: the variance of all pixels of MNIST.
PLATEAU = 0.095


@dataclass(frozen=True)
class Setting:
    """What differs between the runs."""

    label: str
    compressor: Compressor
    noise: float = SIGMA  # standard deviation of the artificial noise in each coordinate of the gradient
    sigmoid: bool = True  # the last activation
    dense_below: int = 256  # parameters with fewer coordinates are sent uncompressed; 0: k counts all coordinates
    checks_escapes: bool = False  # True: with the escape check of Algorithm 1, lines 4 to 8
    is_certified: bool = False


@dataclass(frozen=True)
class Size:
    """The size of a scale: epochs, number of images, steps of a row, and steps between two escape checks."""

    epochs: float = 20.0
    limit: int | None = None
    every: int = 100
    interval: int = 1000


SCALES: dict[Scale, Size] = {"paper": Size(), "cpu": Size(), "smoke": Size(2.0, 6400, every=10, interval=50)}
# The settings of each study, by the names of their files.

FIGURE_2 = {"dense": Identity(), "topk": TopK(0.001), "randomk": RandomK(0.001)}
LABELS = {"dense": "uncompressed", "topk": "TopK 0.1%", "randomk": "RandomK 0.1%"}
NOISES = {"": ("no noise", 0.0), "-noise": (f"noise {SIGMA:g}", SIGMA)}
RATIOS = (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
STUDIES: dict[str, dict[str, Setting]] = {
    "figure2": {
        name + suffix: Setting(f"{LABELS[name]}, {noise}", c, std, is_certified=True)
        for name, c in FIGURE_2.items()
        for suffix, (noise, std) in NOISES.items()
    },
    "figure2-open": {
        "linear": Setting("uncompressed, linear output, no noise", Identity(), 0.0, sigmoid=False),
        "linear-noise": Setting("uncompressed, linear output, noise 0.01", Identity(), sigmoid=False),
        "topk": Setting("TopK 0.1%, vectors dense, noise 0.01", TopK(0.001)),
        "topk-global": Setting("TopK 0.1% of all coordinates, noise 0.01", TopK(0.001), dense_below=0),
        "randomk": Setting("RandomK 0.1%, vectors dense, noise 0.01", RandomK(0.001)),
        "randomk-global": Setting("RandomK 0.1% of all coordinates, noise 0.01", RandomK(0.001), dense_below=0),
    },
    "figure2-compressors": {name: Setting(label, c) for name, (label, c) in NINE.items()},
    "figure2-k": {
        f"{kind.__name__.lower()}-{ratio:g}": Setting(f"{kind.__name__} {ratio:.3g}", kind(ratio))
        for ratio in RATIOS
        for kind in (TopK, RandomK)
    },
    "figure2-escape": {
        way + suffix: Setting(f"{words}, {noise}", RandomK(0.001), std, checks_escapes=way == "on")
        for suffix, (noise, std) in NOISES.items()
        for way, words in (("off", "no check"), ("on", "check every 1000 steps"))
    },
}


def train(run: Run[Setting], report: Report, *, data_dir: Path, size: Size) -> list[Row]:
    """Do one run: SGD with compressed gradients and noise, on one worker. Return a row for every 100 steps."""
    setting, seed = run.setting, run.seed

    # The data, and the network of the paper's footnote 7.
    images = load_images("mnist", data_dir, train=True, limit=size.limit)
    own = shard(images, "iid", worker=0, workers=1, seed=seed)
    batches, per_epoch = Batches(own, BATCH, seed=seed), len(images) // BATCH
    steps = round(size.epochs * per_epoch)
    model = seeded(partial(mnist_autoencoder, sigmoid=setting.sigmoid), seed)

    # The paper lowers the noise "at later iterations": here from 60% to 85% of the steps.
    checked = images.pixels(own[:1024])
    optimizer = CompressedSGD(
        model.named_parameters(),
        LR,
        Compression(setting.compressor, dense_below=setting.dense_below),
        noise=Ramp(setting.noise, round(0.6 * steps), round(0.85 * steps)),
        escape=Escape(size.interval, 1.0, lambda: mean_loss(model, checked)) if setting.checks_escapes else None,
        seed=seed,
    )

    measured = Measurements(steps, per_epoch, size.every, optimizer.ledger)
    for step in range(1, steps + 1):
        pixels = images.pixels(batches[step - 1])
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(pixels), pixels)
        torch.autograd.backward(loss)
        measured.add(step, loss, model.parameters())
        optimizer.step()

        # Is this point a saddle? Asked on 500 images, at the first row after 15% of the steps, and at the last one.
        row = measured.row(step)
        if row is not None and setting.is_certified:
            row |= dict.fromkeys(("verdict", "lambda_min_lower", "lambda_min_upper"))
            if step == steps or step - size.every < 0.15 * steps <= step:
                with measured.paused():
                    row |= certified(model, images, seed, step, is_last=step == steps)
        report(step / steps)

    tests = load_images("mnist", data_dir, train=False)
    measured.rows[-1]["test_loss"] = float(mean_loss(model, tests.pixels(torch.arange(len(tests)))))
    return measured.rows


@torch.no_grad()
def mean_loss(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return the mean loss on images, float[n, 1, 28, 28]."""
    losses = [nn.functional.mse_loss(model(part), part) * len(part) for part in torch.split(pixels, 512)]
    return torch.stack(losses).sum() / len(pixels)


def certified(model: nn.Module, images: Images, seed: int, step: int, *, is_last: bool) -> Row:
    """Return the certificate of the current point on 500 images, with at most 40 Hessian-vector products."""
    chosen = torch.randperm(len(images), generator=generator(seed, 0, Stream.CERTIFY))[:500]
    try:
        found = certify(
            model,
            reconstruction,
            [images.pixels(chosen)],
            epsilon=1e-2 if is_last else 2e-3,
            hessian_lipschitz=1e-3,
            search=Search(max_hvps=40, sample=False, seconds=math.inf, generator=generator(seed, step, Stream.CERTIFY)),
            sample_of=len(images),
            progress=False,
        )
    except NotFiniteError:
        return {"verdict": "not finite"}
    ends = {name: getattr(found, name) for name in ("lambda_min_lower", "lambda_min_upper")}
    return {"verdict": str(found.verdict), **{name: x if math.isfinite(x) else None for name, x in ends.items()}}


def reconstruction(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return the loss that is certified."""
    return nn.functional.mse_loss(model(pixels), pixels)


# The figure and the sentences.


def findings(summary: Json, curves: Sequence[Curve]) -> list[str]:
    """Return sentences on how many epochs of the plateau noise saves, paired by seed, and on the final losses.

    A run that ends on the plateau is counted with all epochs it spent there, so true differences are at least as large.
    """
    entries = by_setting(summary)
    lines = []
    for label in LABELS.values():
        without, with_noise = (entries[f"{label}, {noise}"] for noise, _ in NOISES.values())
        shorter = paired(without, with_noise, "plateau_epochs", sub)
        still = f"; {without['still_on_plateau']} of {len(without['seeds'])} without it are still there at the end"
        lines.append(
            f"{label}: noise shortens the plateau by {interval(shorter, '.2f')} epochs, from "
            f"{without['plateau_epochs']['mean']:.2f} to {with_noise['plateau_epochs']['mean']:.2f}"
            + (still if without["still_on_plateau"] else "")
        )
    dense = entries["uncompressed, noise 0.01"]
    for label in ("TopK 0.1%", "RandomK 0.1%"):
        one = entries[f"{label}, noise 0.01"]
        ratio = paired(one, dense, "final_loss", truediv)
        share = one["megabytes"]["mean"] / dense["megabytes"]["mean"]
        lines.append(
            f"{label} with noise ends at {interval(ratio, '.2f')} times the loss of uncompressed SGD with noise "
            f"({one['final_loss']['mean']:.4f} and {dense['final_loss']['mean']:.4f}), with {share:.2%} of its bytes"
        )
    return lines


def draw(curves: Sequence[Curve]) -> Any:
    """Return the paper's figure, from the curves of its six settings: losses at the left, gradient norms at the right.

    It has one row per compressor against epochs, and a last row against megabytes.
    """
    noises = [noise for noise, _ in NOISES.values()]
    rows = [
        (label, list(zip(drawing.pick(curves, (f"{label}, {noise}" for noise in noises)), noises, strict=True)))
        for label in LABELS.values()
    ]
    return drawing.panels(rows, PLATEAU)


FINDINGS: Mapping[str, Any] = {
    "figure2": findings,
    "figure2-compressors": lambda _, curves: lowest_at(curves),
    "figure2-k": lambda _, curves: lowest_at(curves),
}


def figure2(
    what: Literal["figure2", "open", "compressors", "k", "escape"] = "figure2",
    /,
    *,
    data_dir: Path,
    options: Options = Options(scale="paper"),  # noqa: B008 -- frozen
    compressor: tuple[str, ...] = (),
    noise: tuple[float, ...] = (),
    download: bool = False,
) -> None:
    """Train the paper's MNIST autoencoder, and draw Figure 2 or one of its variants.

    Examples:
        python -m lab.paper.figure2 --data-dir MNIST --download --out fig2
        python -m lab.paper.figure2 compressors --data-dir MNIST --seeds 1
        python -m lab.paper.figure2 --data-dir MNIST --compressor 'TopK(0.01)' 'Sign()' --noise 0 0.003 --seeds 1

    Args:
        what: The paper's figure, or a variant (experiments/README.md has their questions).
        data_dir: Folder of MNIST, as torchvision keeps it.
        options: Those of every study. Scale cpu is the paper's, since two cores can do it.
        compressor: Compressors to train with instead of the study's, such as 'TopK(0.01)'.
        noise: Standard deviations of the noise to train with, for --compressor.
        download: Fetch MNIST into --data-dir if it is not there.
    """
    load_images("mnist", data_dir, train=True, download=download)  # raises an error before the runs start
    name = "figure2" if what == "figure2" else f"figure2-{what}"
    settings = STUDIES[name]
    own = [parse_compressor(text) for text in compressor] or (list(FIGURE_2.values()) if noise else [])
    if own:
        name, levels = "figure2-own", noise or (0.0, SIGMA)
        settings = {
            f"{describe(c)}-{std:g}": Setting(f"{describe(c)}, noise {std:g}", c, std) for c in own for std in levels
        }
    seeds = 2 if options.scale == "smoke" else 10 if name == "figure2" else 3
    runs = do_runs(name, settings, partial(train, data_dir=data_dir, size=SCALES[options.scale]), seeds, options)
    whole = not options.only
    finish(runs, draw if whole and name == "figure2" else drawing.grid, FINDINGS.get(name) if whole else None, PLATEAU)


def main() -> None:
    """Run the command line."""
    serve(figure2, "python -m lab.paper.figure2")


if __name__ == "__main__":
    main()
