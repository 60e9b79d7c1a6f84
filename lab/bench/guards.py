"""The cost of the guards: a step of CompressedSGD with and without them, alone and in training of a model.

python -m lab.bench.guards [--layers 161] [--d 25000000] [--no-model]

Milliseconds on one thread, in alternating turns. With a model (ResNet-50, d = 25.6 million, --batch images of 224 x
224) whole training steps are measured too, and the guards' fraction of their time is printed.
"""

import argparse

import torch
from torch import nn

from packsaddle import CompressedSGD, Compression, RandomK, TopK
from packsaddle.feedback.checks import fingerprint
from packsaddle.numerics import is_in_range
from packsaddle.plan import side_by_side


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=25_000_000)
    parser.add_argument("--layers", type=int, default=161)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--no-model", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    def made(guarded: bool, compressor: RandomK | TopK, noise: float) -> CompressedSGD:
        side = max(40, int((arguments.d / arguments.layers) ** 0.5))
        weights = [nn.Parameter(torch.randn(side, side)) for _ in range(arguments.layers)]
        for w in weights:
            w.grad = torch.randn_like(w)
        bare = Compression(compressor, max_skipped=None, compare_every=0)
        return CompressedSGD(weights, 1e-3, compressor if guarded else bare, noise=noise)

    cases = {
        "RandomK 1%": (RandomK(0.01), 0.0),
        "RandomK 1%, noise": (RandomK(0.01), 0.01),
        "TopK 1%": (TopK(0.01), 0.0),
    }
    added = {}
    for name, (compressor, noise) in cases.items():
        bare, guarded = made(False, compressor, noise), made(True, compressor, noise)
        times = side_by_side({"bare": bare.step, "guarded": guarded.step})
        added[name] = 1e3 * (times["guarded"].median - times["bare"].median)
        print(f"{name}: {1e3 * times['bare'].median:.1f} ms bare, {1e3 * times['guarded'].median:.1f} with guards")
    vector, other = torch.randn(arguments.d), torch.zeros(arguments.d)
    parts = {
        "copy": lambda: other.copy_(vector),
        "is_in_range": lambda: is_in_range(vector),
        "fingerprint": lambda: fingerprint(vector),
    }
    for name, timing in side_by_side(parts).items():
        print(f"{name} of {arguments.d:,} numbers: {1e3 * timing.median:.1f} ms")
    if not arguments.no_model:
        _share_of_a_step(arguments.batch, added)


def _share_of_a_step(batch: int, added: dict[str, float]) -> None:
    from torchvision.models import resnet50

    model = resnet50()
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(0, 1000, (batch,))

    def pass_over() -> None:
        model.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()

    seconds = side_by_side({"backward": pass_over})["backward"].median
    print(f"forward and backward of ResNet-50, {batch} images: {1e3 * seconds:.0f} ms")
    for name, more in added.items():
        print(f"guards' share of a step with {name}: {100 * more / (1e3 * seconds):.2f}%")


if __name__ == "__main__":
    main()
