"""The paper's Figure 2: a saddle in training the MNIST autoencoder, and noise that shortens the stay at it."""

from collections.abc import Mapping, Sequence
from typing import Any

from packsaddle.compress import Identity, RandomK, TopK
from packsaddle.config import AnyCompressor, CertifyConfig, Config, DataConfig, ModelConfig, NoiseConfig
from packsaddle.curves import Curve
from packsaddle.reproduce import drawing
from packsaddle.reproduce.study import Scale, Study
from packsaddle.schema import ConfigError

# The loss of the best constant grey: the variance of all pixels of MNIST.
PLATEAU = 0.095
SIGMA = 0.01
COMPRESSORS: dict[str, tuple[str, AnyCompressor]] = {
    "dense": ("uncompressed", Identity()),
    "topk": ("TopK 0.1%", TopK(0.001)),
    "randomk": ("RandomK 0.1%", RandomK(0.001)),
}
NOISES = {"": ("no noise", 0.0), "-noise": (f"noise {SIGMA:g}", SIGMA)}


def study(scale: Scale) -> Study:
    """Three compressors, each with and without noise; `cpu` is the paper's setting whole, like `paper`."""
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
    """One setting. The paper lowers the noise "at later iterations": here from 60% to 85% of the epochs."""
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


def draw(curves: Sequence[Curve], summary: Mapping[str, Any]) -> Any:
    """Return the paper's figure, loss above gradient norm, a column per compressor, and a column against megabytes.

    `curves` has the study's six settings. Raises ConfigError if one is missing.
    """
    by_label = {curve.setting: curve for curve in curves}
    try:
        columns = [
            (label, [(by_label[f"{label}, {noise}"], noise) for noise, _ in NOISES.values()])
            for label, _ in COMPRESSORS.values()
        ]
    except KeyError as missing:
        raise ConfigError(f"the figure needs a curve of every setting, but {missing} has none") from None
    return drawing.panels(columns, PLATEAU)
