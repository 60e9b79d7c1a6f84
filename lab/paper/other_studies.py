"""Further studies of the paper's two tasks, and of a language model.

They vary details that the paper leaves open, the compressor, the ratio k/d, the escape check and the method.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lab.paper import figure1, figure2
from lab.paper.study import Data, Scale, Study
from lab.runs import AnyCompressor, Config, EscapeConfig, LocalConfig, NoiseConfig
from lab.runs.report import Curve
from lab.tasks import DataConfig, ModelConfig
from packsaddle.compressors import (
    QSGD,
    AdaptiveTopK,
    Identity,
    LinearSketch,
    LowRank,
    RandomK,
    SharedTopK,
    Sign,
    SketchTopK,
    TopK,
)

_SEEDS = 3


def _autoencoder(scale: Scale, compressor: AnyCompressor, label: str, std: float = figure2.SIGMA) -> Config:
    epochs, limit = (20.0, None) if scale != "smoke" else (2.0, 6400)
    return replace(figure2.config(compressor, std, label, epochs=epochs, limit=limit), certify=None)


def open_points(scale: Scale, data: Data) -> Study:
    """Return the study of details that the paper leaves open.

    They are the autoencoder's last activation, and whether k counts coordinates of the whole model, or of the matrices
    only, with vectors sent uncompressed.
    """

    def without_sigmoid(config: Config) -> Config:
        return replace(config, model=replace(config.model, output="linear"))

    settings = {
        "linear": without_sigmoid(_autoencoder(scale, Identity(), "uncompressed, linear output, no noise", 0.0)),
        "linear-noise": without_sigmoid(_autoencoder(scale, Identity(), "uncompressed, linear output, noise 0.01")),
    }
    for name in ("topk", "randomk"):
        label, compressor = figure2.COMPRESSORS[name]
        dense = _autoencoder(scale, compressor, f"{label}, vectors dense, noise 0.01")
        everything = replace(dense, dense_below=0, label=f"{label} of all coordinates, noise 0.01")
        settings |= {name: dense, f"{name}-global": everything}
    return Study("fig2-open", scale, settings, _SEEDS)


def compressors(scale: Scale, data: Data) -> Study:
    """Return the study of nine lossy compressors on the autoencoder with noise."""
    settings = {name: _autoencoder(scale, c, label) for name, (label, c) in _OTHERS.items()}
    return Study("fig2-compressors", scale, settings, _SEEDS)


def resnet_compressors(scale: Scale, data: Data) -> Study:
    """Return the study of nine lossy compressors on the ResNet, with ten workers of one class each.

    Scale `cpu` has 8 epochs instead of Figure 1's 20: most of these compressors need a separate gradient for each
    worker, since messages are gathered, so the simulation is slower.
    """
    settings = {name: figure1.config(scale, data, c, label) for name, (label, c) in _OTHERS.items()}
    if scale == "cpu":
        settings = {name: replace(config, epochs=8.0) for name, config in settings.items()}
    return Study("fig1-compressors", scale, settings, 1)


_OTHERS: dict[str, tuple[str, AnyCompressor]] = {
    "randomk": ("RandomK 1%", RandomK(0.01)),
    "topk": ("TopK 1%", TopK(0.01)),
    "adaptive": ("AdaptiveTopK 50%", AdaptiveTopK(0.5)),
    "shared": ("SharedTopK 1%", SharedTopK(0.01)),
    "sketch": ("SketchTopK 1%", SketchTopK(0.01)),
    "linear-sketch": ("LinearSketch 1%", LinearSketch(0.01)),
    "sign": ("Sign", Sign()),
    "qsgd": ("QSGD", QSGD()),
    "lowrank": ("LowRank 1", LowRank()),
}


def language(scale: Scale, data: Data) -> Study:
    """Return the study of compressors on a small language model, with two workers, with and without noise."""
    epochs, limit = (30.0, None) if scale != "smoke" else (1.0, 640)
    settings: dict[str, Config] = {}
    for name, (label, compressor) in {"dense": ("uncompressed", Identity()), **_OTHERS}.items():
        for suffix, (noise, std) in {"": ("no noise", 0.0), "-noise": ("noise 0.001", 0.001)}.items():
            if std and name not in ("dense", "randomk", "topk"):
                continue
            settings[name + suffix] = Config(
                data=DataConfig("text", limit=limit),
                model=ModelConfig("char-transformer"),
                lr=0.3,
                epochs=epochs,
                batch_size=16,
                workers=2,
                compressor=compressor,
                noise=NoiseConfig(std, lower_from=0.6 * epochs, lower_until=0.85 * epochs),
                label=f"{label}, {noise}",
                log_every=50 if limit is None else 5,
                test_every=1.0,
            )
    return Study("text", scale, settings, _SEEDS)


def variants(scale: Scale, data: Data) -> Study:
    """Return the study of methods with TopK 1% on the small language model: error feedback, momentum and local updates.

    Each of two workers has one half of the text.
    """
    epochs, limit = (30.0, None) if scale != "smoke" else (1.0, 640)
    plain = Config(
        data=DataConfig("text", shard="class", limit=limit),
        model=ModelConfig("char-transformer"),
        lr=0.3,
        epochs=epochs,
        batch_size=16,
        workers=2,
        compressor=TopK(0.01),
        log_every=48 if limit is None else 4,
        test_every=1.0,
    )
    dense = replace(plain, compressor=Identity(), label="uncompressed")
    settings = {
        "dense": dense,
        "dense-momentum": replace(dense, lr=0.03, momentum=0.9, label="uncompressed, momentum 0.9"),
        "plain": replace(plain, label="error feedback"),
        "momentum": replace(plain, lr=0.03, momentum=0.9, label="error feedback, momentum 0.9"),
        "local-4": replace(plain, local=LocalConfig("sgd", every=4), label="error feedback, 4 local steps"),
        "local-16": replace(plain, local=LocalConfig("sgd", every=16), label="error feedback, 16 local steps"),
    }
    return Study("text-variants", scale, settings, _SEEDS)


def ratios(scale: Scale, data: Data) -> Study:
    """Return the study of TopK and RandomK at ratios from 10% to 0.03%, on the autoencoder with noise."""
    settings: dict[str, Config] = {}
    for ratio in (0.1, 0.03, 0.01, 0.003, 0.001, 0.0003):
        settings[f"topk-{ratio:g}"] = _autoencoder(scale, TopK(ratio), f"TopK {ratio:.3g}")
        settings[f"randomk-{ratio:g}"] = _autoencoder(scale, RandomK(ratio), f"RandomK {ratio:.3g}")
    return Study("fig2-k", scale, settings, _SEEDS)


def escape_check(scale: Scale, data: Data) -> Study:
    """Return the study of Algorithm 1's escape check (lines 4 to 8), on and off, with and without noise.

    The compressor is RandomK 0.1%.
    """
    settings: dict[str, Config] = {}
    for suffix, (noise, std) in figure2.NOISES.items():
        plain = _autoencoder(scale, RandomK(0.001), f"no check, {noise}", std)
        rule = EscapeConfig(interval=1000 if scale != "smoke" else 50, radius=1.0)
        settings |= {
            f"off{suffix}": plain,
            f"on{suffix}": replace(plain, escape=rule, label=f"check every {rule.interval} steps, {noise}"),
        }
    return Study("fig2-escape", scale, settings, _SEEDS)


BUDGETS = (2.0, 10.0, 50.0, 250.0, 1000.0)  # megabytes


def equal_bytes(_: Mapping[str, Any], curves: Sequence[Curve]) -> list[str]:
    """Return one line for each budget of megabytes: the four settings with the lowest losses at that point.

    Settings that send less in their whole run are omitted.
    """
    lines = []
    for budget in BUDGETS:
        reached = {curve.setting: loss for curve in curves if (loss := _loss_at(curve, budget)) is not None}
        if reached:
            first, *others = sorted(reached, key=lambda setting: reached[setting])
            then = "".join(f"; {setting} {reached[setting]:.4f}" for setting in others[:3])
            lines.append(f"at {budget:g} MB: {first} {reached[first]:.4f}{then}")
    return lines


def _loss_at(curve: Curve, megabytes: float) -> float | None:
    """Return the curve's last loss within a budget of megabytes.

    Returns None if the whole run sent less, or if its first point is beyond the budget.
    """
    x, mean, _, _ = curve.along("megabytes", "loss")
    if not x or x[-1] < megabytes:
        return None
    before = [loss for at, loss in zip(x, mean, strict=True) if at <= megabytes]
    return before[-1] if before else None
