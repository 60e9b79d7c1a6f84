"""The paper's Figure 2: in training the MNIST autoencoder, noise shortens the time spent near a saddle."""

from collections.abc import Mapping, Sequence
from operator import sub, truediv
from typing import Any

from lab.paper import drawing
from lab.paper.results import by_setting, interval, paired
from lab.paper.study import Data, Scale, Study
from lab.runs import AnyCompressor, CertifyConfig, Config, NoiseConfig
from lab.runs.report import Curve
from lab.tasks import DataConfig, ModelConfig
from packsaddle.compressors import Identity, RandomK, TopK

# The loss if every output pixel has the same, best gray value: the variance of all pixels of MNIST.
PLATEAU = 0.095
SIGMA = 0.01
COMPRESSORS: dict[str, tuple[str, AnyCompressor]] = {
    "dense": ("uncompressed", Identity()),
    "topk": ("TopK 0.1%", TopK(0.001)),
    "randomk": ("RandomK 0.1%", RandomK(0.001)),
}
NOISES = {"": ("no noise", 0.0), "-noise": (f"noise {SIGMA:g}", SIGMA)}


def study(scale: Scale, data: Data) -> Study:
    """Return the study of three compressors, each with and without noise. Scale `cpu` equals scale `paper` here."""
    epochs, seeds, limit = (20.0, 10, None) if scale != "smoke" else (2.0, 2, 6400)
    settings = {
        name + suffix: config(compressor, std, f"{label}, {noise}", epochs=epochs, limit=limit)
        for name, (label, compressor) in COMPRESSORS.items()
        for suffix, (noise, std) in NOISES.items()
    }
    return Study("fig2", scale, settings, seeds)


def config(
    compressor: AnyCompressor, std: float, label: str, *, epochs: float = 20.0, limit: int | None = None
) -> Config:
    """Return the configuration of one setting, with noise of standard deviation `std`.

    The paper lowers the noise "at later iterations"; here it falls to zero from 60% to 85% of the epochs.
    """
    return Config(
        data=DataConfig("mnist", limit=limit),
        model=ModelConfig("mnist-autoencoder"),
        lr=0.1,
        epochs=epochs,
        batch_size=64,
        compressor=compressor,
        noise=NoiseConfig(std, lower_from=0.6 * epochs, lower_until=0.85 * epochs),
        certify=CertifyConfig(
            epsilon=2e-3, hessian_lipschitz=1e-3, at=(0.15 * epochs,), examples=500, max_hvps=40, last_epsilon=1e-2
        ),
        label=label,
        log_every=100 if limit is None else 10,
        plateau=PLATEAU,
    )


def findings(summary: Mapping[str, Any], curves: Sequence[Curve]) -> list[str]:
    """Return sentences on how many epochs of the plateau noise saves, paired by seed, and on the final losses.

    A run that ends on the plateau is counted with all epochs it spent there, so true differences are at least as large.
    """
    entries = by_setting(summary)
    lines = []
    for label, _ in COMPRESSORS.values():
        without, with_noise = (entries[f"{label}, {noise}"] for noise, _ in NOISES.values())
        if without["plateau_epochs"] is None:  # the configuration has no level of a plateau
            continue
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
    """Return the paper's figure: losses at the left and gradient norms at the right.

    It has one row per compressor against epochs, and a last row against megabytes. `curves` has the study's six
    settings.
    """
    noises = [noise for noise, _ in NOISES.values()]
    rows = [
        (label, list(zip(drawing.pick(curves, (f"{label}, {noise}" for noise in noises)), noises, strict=True)))
        for label, _ in COMPRESSORS.values()
    ]
    return drawing.panels(rows, PLATEAU)
