"""The paper's Figure 1: ResNet-34 on CIFAR-10, ten workers of one class each, RandomK from 100% to 0.1%."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import sub
from typing import Any, Literal

from lab.paper.results import by_setting, interval, paired
from lab.paper.study import Data, Scale, Study
from lab.runs import AnyCompressor, Config
from lab.runs.report import Curve
from lab.tasks import DataConfig, ModelConfig
from packsaddle.compressors import Identity, RandomK

Norm = Literal["all", "worker", "group"]
WORKERS = 10
COMPRESSORS: dict[str, tuple[str, AnyCompressor]] = {
    "dense": ("100%", Identity()),
    "randomk-10": ("RandomK 10%", RandomK(0.1)),
    "randomk-1": ("RandomK 1%", RandomK(0.01)),
    "randomk-0.1": ("RandomK 0.1%", RandomK(0.001)),
}


def study(scale: Scale, data: Data) -> Study:
    """Return the study of RandomK at four ratios, with batch normalization over all workers.

    `lab.tasks.models` explains the alternatives to it.
    """
    settings = {name: config(scale, data, c, label) for name, (label, c) in COMPRESSORS.items()}
    return Study("fig1", scale, settings, 3 if scale != "smoke" else 1)


def norms(scale: Scale, data: Data) -> Study:
    """Return the study of normalization layers for workers that have images of one class each.

    Each layer is run uncompressed and with RandomK 1%.
    """
    names: dict[Norm, str] = {
        "all": "batch norm over all",
        "worker": "batch norm by worker",
        "group": "group norm",
    }
    settings = {}
    for norm, described in names.items():
        for name in ("dense", "randomk-1"):
            label, compressor = COMPRESSORS[name]
            base = config(scale, data, compressor, f"{label}, {described}")
            settings[f"{name}-{norm}"] = replace(base, model=replace(base.model, norm=norm))
    return Study("fig1-norms", scale, settings, 1)


def config(scale: Scale, data: Data, compressor: AnyCompressor, label: str) -> Config:
    """Return the configuration of one setting, with step size 0.1 and batches of 8 per worker at every scale.

    Scale `paper` has the whole network, with the stem for small images. Scale `cpu` has a quarter of the channels and
    torchvision's own stem, which need 1/200 of the arithmetic, and all images.
    """
    epochs, model, limit = {
        "paper": (50.0, ModelConfig("resnet34", norm="all"), None),
        "cpu": (20.0, ModelConfig("resnet34", width=16, stem="imagenet", norm="all"), None),
        "smoke": (2.0, ModelConfig("resnet34", width=4, stem="imagenet", norm="all"), 400),
    }[scale]
    return Config(
        data=DataConfig(data, shard="class", limit=limit),
        model=model,
        lr=0.1,
        epochs=epochs,
        batch_size=8,
        compressor=compressor,
        label=label,
        workers=WORKERS,
        log_every=125 if limit is None else 1,
        test_every=1.0,
    )


def findings(summary: Mapping[str, Any], curves: Sequence[Curve]) -> list[str]:
    """Return sentences that compare RandomK with uncompressed training: last epoch's loss, test accuracy and bytes.

    Differences are paired by seed.
    """
    entries = by_setting(summary)
    whole = entries["100%"]
    lines = []
    for label, _ in list(COMPRESSORS.values())[1:]:
        one = entries[label]
        loss = paired(one, whole, "final_loss", sub)
        accuracy = paired(one, whole, "test_accuracy", sub)
        share = one["megabytes"]["mean"] / whole["megabytes"]["mean"]
        lines.append(
            f"{label}: final loss {interval(loss, '+.3f')} and test accuracy {interval(accuracy, '+.3f')} "
            f"against 100%, with {share:.1%} of its bytes"
        )
    return lines
