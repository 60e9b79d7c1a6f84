"""How often are a certificate's bounds violated if Hessian-vector products are differences of gradients?

    python -m lab.bench.certificate_coverage --out coverage.csv [--seeds N N N]

Networks of 26, 280 and 1,984 parameters far from their minimum, in float32 and bfloat16, against the dense Hessian of
the same weights in float64. One row per certificate is appended to the file, and a second call continues it. Prints one
line per case, the violations of each bound. The upper bound on lambda_min and the lower one on lambda_max must never be
violated, the others at most with probability DELTA.
"""

import argparse
import copy
import csv
import math
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from packsaddle import certify
from packsaddle.curvature import Search

DELTA = 0.05
WIDTHS = {26: (3, 4, 2), 280: (8, 16, 8), 1984: (24, 40, 24)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PRODUCTS = 20
COLUMNS = [
    "d",
    "dtype",
    "seed",
    "lambda_min",
    "lower",
    "upper",
    "lambda_max",
    "max_lower",
    "max_upper",
    "hvp_error",
    "passes",
]

Batch = tuple[Tensor, Tensor]


def network(seed: int, dtype: torch.dtype, widths: tuple[int, ...]) -> tuple[nn.Module, Batch]:
    """Return a tanh network with Gaussian weights, and 64 examples."""
    rng = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            scale = 0.7 * math.sqrt(3 / p.shape[-1]) if p.ndim > 1 else 0.7
            p.copy_(scale * torch.randn(p.shape, generator=rng))
    x, y = torch.randn(64, widths[0], generator=rng), 2 * torch.randn(64, widths[-1], generator=rng)
    return model, (x.to(dtype), y.to(dtype))


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def dense_extremes(model: nn.Module, batch: Batch) -> tuple[float, float]:
    """Return the extreme eigenvalues of the Hessian at the model's weights, in double precision."""
    model = copy.deepcopy(model).double()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    x, y = batch[0].double(), batch[1].double()

    def f(theta: Tensor) -> Tensor:
        pieces = torch.split(theta, [shape.numel() for shape in shapes.values()])
        named = {name: piece.view(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}
        return nn.functional.mse_loss(torch.func.functional_call(model, named, (x,)), y)

    theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    gradient, back = torch.func.vjp(torch.func.grad(f), theta)
    (hessian,) = torch.func.vmap(back, chunk_size=64)(torch.eye(len(gradient), dtype=torch.float64))
    eigenvalues = torch.linalg.eigvalsh((hessian + hessian.T) / 2)
    return float(eigenvalues[0]), float(eigenvalues[-1])


def row(d: int, dtype: str, seed: int) -> list[object]:
    model, batch = network(seed, DTYPES[dtype], WIDTHS[d])
    smallest, largest = dense_extremes(model, batch)
    c = certify(
        model,
        loss_fn,
        [batch],
        epsilon=1e3,
        hessian_lipschitz=smallest**2 / 1e3,  # a threshold at lambda_min, which takes all products
        search=Search(
            failure_probability=DELTA,
            max_hvps=PRODUCTS,
            hvp="differences",
            generator=torch.Generator().manual_seed(seed),
        ),
    )
    found = (smallest, c.lambda_min_lower, c.lambda_min_upper, largest, c.lambda_max_lower, c.lambda_max_upper)
    return [d, dtype, seed, *(f"{value:.9e}" for value in found), f"{c.hvp_error:.3e}", c.backward_passes]


def summary(rows: list[dict[str, str]]) -> None:
    """Print the violations of each case, with a tolerance for rounding of the dense eigenvalues."""
    print("      d  dtype     seeds  upper  lower (share)   max's lower  max's upper (share)  error / norm  gap / norm")
    for case in sorted({(int(r["d"]), r["dtype"]) for r in rows}):
        chosen = [r for r in rows if (int(r["d"]), r["dtype"]) == case]
        values = [{k: float(r[k]) for k in COLUMNS[3:]} for r in chosen]
        norms = [max(abs(v["lambda_min"]), abs(v["lambda_max"])) for v in values]
        pairs = list(zip(values, norms, strict=True))
        upper = sum(v["upper"] < v["lambda_min"] - 1e-9 * n for v, n in pairs)
        lower = sum(v["lower"] > v["lambda_min"] + 1e-9 * n for v, n in pairs)
        below = sum(v["max_lower"] > v["lambda_max"] + 1e-9 * n for v, n in pairs)
        above = sum(v["max_upper"] < v["lambda_max"] - 1e-9 * n for v, n in pairs)
        error = sorted(v["hvp_error"] / n for v, n in pairs)[len(pairs) // 2]
        gap = sorted((v["upper"] - v["lower"]) / n for v, n in pairs)[len(pairs) // 2]
        k = len(chosen)
        print(
            f"{case[0]:7,}  {case[1]:8} {k:6}  {upper:5}  {lower:5} ({lower / k:.1%})  {below:12}  "
            f"{above:11} ({above / k:.1%})  {error:12.1e}  {gap:10.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs=3, default=(500, 500, 500), help="of each size of network")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = list(csv.DictReader(args.out.open())) if args.out.exists() else []
    done = {(int(r["d"]), r["dtype"], int(r["seed"])) for r in rows}
    with args.out.open("a", newline="") as file:
        writer = csv.writer(file)
        if not rows:
            writer.writerow(COLUMNS)
        for d, seeds in zip(WIDTHS, args.seeds, strict=True):
            for seed in range(seeds):
                for dtype in DTYPES:
                    if (d, dtype, seed) not in done:
                        writer.writerow(row(d, dtype, seed))
                        file.flush()
    summary(list(csv.DictReader(args.out.open())))


if __name__ == "__main__":
    main()
