"""Ten seeds of the MNIST autoencoder, as ten runs or as one batched computation over ten networks: time per seed.

python -m lab.bench.seeds [--seeds 10]
"""

import argparse

import torch
from torch.func import functional_call, grad, stack_module_state, vmap

from lab.runs.tasks import mnist_autoencoder
from packsaddle.plan import side_by_side


def main() -> None:
    """Time forward and backward of a batch of 64 on one thread, alternating between the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    images = torch.rand(seeds, 64, 1, 28, 28)
    alone = mnist_autoencoder().to(memory_format=torch.channels_last)
    networks = [mnist_autoencoder() for _ in range(seeds)]
    stacked = {name: p.detach() for name, p in stack_module_state(networks)[0].items()}
    skeleton = mnist_autoencoder().to("meta")

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(functional_call(skeleton, parameters, (x,)), x)

    def one_after_the_other() -> None:
        for x in images:
            alone.zero_grad()
            torch.nn.functional.mse_loss(alone(x), x).backward()

    batched = vmap(grad(loss))
    times = side_by_side({"runs": one_after_the_other, "vmap": lambda: batched(stacked, images)})
    for name, timing in times.items():
        ratio = timing.median / times["runs"].median
        print(f"{name}: {1000 * timing.median / seeds:.1f} ms a seed, {ratio:.2f} of separate runs")


if __name__ == "__main__":
    main()
