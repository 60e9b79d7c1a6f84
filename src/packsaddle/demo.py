"""The demonstration: a deep autoencoder on digits, from a start where plain SGD stalls at a saddle."""

from packsaddle.compress import Identity, RandomK, TopK
from packsaddle.config import AnyCompressor, Config, DataConfig, ModelConfig, NoiseConfig

EPOCHS = 60.0
# The loss of the best constant output: the mean variance of a pixel of the training digits.
PLATEAU = 0.0735


def configs(workers: int, epochs: float = EPOCHS, seed: int = 0) -> dict[str, Config]:
    """Return the four runs by folder name: they differ in compressor and noise alone."""
    settings: dict[str, tuple[str, AnyCompressor, float]] = {
        "dense": ("dense", Identity(), 0.0),
        "dense-noise": ("dense + noise", Identity(), 0.003),
        "randomk-noise": ("RandomK 1% + noise", RandomK(0.01), 0.003),
        "topk-noise": ("TopK 1% + noise", TopK(0.01), 0.003),
    }
    return {
        name: Config(
            data=DataConfig("digits"),
            model=ModelConfig("autoencoder", (256, 128, 64, 32, 10)),
            lr=1.0,
            epochs=epochs,
            batch_size=max(1, 32 // max(1, workers)),
            compressor=compressor,
            noise=NoiseConfig(std, lower_from=0.6 * epochs, lower_until=0.85 * epochs),
            label=label,
            seed=seed,
            workers=workers,
            log_every=23,
            plateau=PLATEAU,
        )
        for name, (label, compressor, std) in settings.items()
    }
