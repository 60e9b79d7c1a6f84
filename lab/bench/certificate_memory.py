"""How much memory does a certificate of 25 million parameters need, and does it respect its limit?

    python -m lab.bench.certificate_memory [--d 25000000] [--products 40] [--memory-limit BYTES]

A wide linear layer with fewer examples than inputs, so that the certificate's vectors need more memory than the
activations, and lambda_min = 0 keeps the verdict open. Prints peak resident memory and its floor: parameters, the
stored vectors, and eight more of d doubles.
"""

import argparse
import resource
import time

import torch
from torch import Tensor, nn

from packsaddle import certify
from packsaddle.curvature import Search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=25_000_000)
    parser.add_argument("--products", type=int, default=40)
    parser.add_argument("--memory-limit", type=int, default=4 * 2**30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    width = round(args.d**0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Linear(width, width, bias=False)
    d = sum(p.numel() for p in model.parameters())
    data = torch.randn(128, width, generator=torch.Generator().manual_seed(1))

    def loss_fn(network: nn.Module, batch: Tensor) -> Tensor:
        return nn.functional.mse_loss(network(batch), batch)

    before = peak()
    begin = time.perf_counter()
    certificate = certify(
        model,
        loss_fn,
        [data],
        epsilon=1e3,
        hessian_lipschitz=1e-24,
        search=Search(
            max_hvps=args.products, memory_limit=args.memory_limit, generator=torch.Generator().manual_seed(2)
        ),
    )
    vectors = min(args.products, args.memory_limit // (8 * d))
    floor = 4 * d + 8 * d * (vectors + 8)
    print(certificate)
    print(f"d {d:,}: {certificate.hvps} products, {vectors} vectors kept, {time.perf_counter() - begin:.0f} s")
    print(f"peak {peak() / 2**30:.1f} GiB, {before / 2**30:.1f} GiB of it before; floor {floor / 2**30:.1f} GiB")


def peak() -> int:
    """Return the peak resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
