"""The cost of a certificate's verdict, compared with common eigensolvers for the smallest eigenvalue of a Hessian.

    python -m lab.bench.certificate_cost RUN_DIR --data-dir DIR [--examples N] [--repeats R]

One run, one thread, the same examples and weights for all. Each peer must reach the relative residual
||H v - lambda v|| / |lambda| that packsaddle had at its verdict; none of them also bounds lambda_min from below.
hessian-eigenthings needs its number of steps in advance. It is measured with the smallest sufficient number (found
beforehand, not counted), and with a number doubled from its default of 2 until it converges.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh

from lab.runs import Audit
from lab.runs.tasks import task_loss
from packsaddle import Certificate, certify
from packsaddle.comm import Communicator, Ledger, Solo
from packsaddle.curvature import Curvature, Search

Measured = tuple[float, int]  # lambda_min, Hessian-vector products


def packsaddle(task: Any, batches: list[Any], seed: int, **settings: Any) -> Certificate:
    generator = torch.Generator().manual_seed(seed)
    return certify(task, task_loss, batches, search=Search(generator=generator), **settings)


def scipy_eigsh(task: Any, batches: list[Any], seed: int, tol: float) -> Measured:
    """Run ARPACK with packsaddle's Hessian-vector products."""
    curvature = Curvature(task, task_loss, batches, Communicator(Solo(), Ledger()))
    operator = LinearOperator(
        (curvature.d, curvature.d),
        matvec=lambda v: curvature.hessian_vector(torch.as_tensor(v).reshape(-1)).numpy(),
        dtype=float,
    )
    start = np.random.default_rng(seed).standard_normal(curvature.d)
    value = eigsh(operator, k=1, which="SA", tol=tol, v0=start, return_eigenvectors=False)[0]
    return float(value), curvature.products


def curvlinops(task: Any, batches: list[Any], seed: int, tol: float) -> Measured:
    """Run ARPACK with curvlinops' operator, as in its documentation."""
    from curvlinops import HessianLinearOperator

    params = [p for p in task.parameters() if p.requires_grad]
    data = [(pixels, pixels) for pixels, _ in batches]
    hessian = HessianLinearOperator(task.network, torch.nn.MSELoss(), params, data, check_deterministic=False)
    plain, products = hessian.to_scipy(), 0

    def matvec(v: np.ndarray) -> np.ndarray:
        nonlocal products
        products += 1
        return plain @ v.astype(np.float32)

    start = np.random.default_rng(seed).standard_normal(plain.shape[0])
    operator = LinearOperator(plain.shape, matvec=matvec, dtype=np.float64)
    return float(eigsh(operator, k=1, which="SA", tol=tol, v0=start, return_eigenvectors=False)[0]), products


def eigenthings(task: Any, batches: list[Any], seed: int, tol: float, steps: int) -> tuple[float, float, int]:
    """Return lambda, relative residual and number of products."""
    from hessian_eigenthings import HessianOperator, lanczos

    operator = HessianOperator(task, batches, task_loss)
    result = lanczos(operator, k=1, which="SA", max_iter=steps, tol=tol, seed=seed, reorthogonalize=True)
    value = float(result.eigenvalues[0])
    return value, float(result.residuals[0]) / abs(value), int(result.iterations)


def eigenthings_doubling(task: Any, batches: list[Any], seed: int, tol: float) -> Measured:
    steps, products = 2, 0
    while True:
        value, residual, done = eigenthings(task, batches, seed, tol, steps)
        products += done
        if residual <= tol:
            return value, products
        steps *= 2


def fewest_steps(task: Any, batches: list[Any], seed: int, tol: float) -> int:
    return next(n for n in range(2, 200) if eigenthings(task, batches, seed, tol, n)[1] <= tol)


def timed(work: Callable[[], Measured]) -> tuple[float, int, float]:
    begin = time.perf_counter()
    value, products = work()
    return value, products, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--epsilon", type=float, default=2e-3)
    parser.add_argument("--rho", type=float, nargs="+", default=[1e-3, 1e-1], help="one verdict for each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    weights = args.run / "checkpoint" / "model.pt"
    audit = Audit(args.run, (weights,), examples=args.examples, data_dir=args.data_dir)
    task, examples = audit.prepare()
    batches = list(examples)
    for rho in args.rho:
        rows: dict[str, list[tuple[float, int, float]]] = {}
        for seed in range(args.repeats):
            settings = {"epsilon": args.epsilon, "hessian_lipschitz": rho}
            certificate = packsaddle(task, batches, seed, **settings)
            tol = certificate.residual / abs(certificate.lambda_min_upper)
            found = (certificate.lambda_min_upper, certificate.hvps, certificate.seconds)
            rows.setdefault(f"packsaddle: {certificate.verdict}", []).append(found)
            best = fewest_steps(task, batches, seed, tol)
            peers: dict[str, Callable[[], Measured]] = {
                "scipy eigsh": lambda s=seed, t=tol: scipy_eigsh(task, batches, s, t),
                "curvlinops + eigsh": lambda s=seed, t=tol: curvlinops(task, batches, s, t),
                "hessian-eigenthings, known": lambda s=seed, t=tol, n=best: eigenthings(task, batches, s, t, n)[::2],
                "hessian-eigenthings, doubling": lambda s=seed, t=tol: eigenthings_doubling(task, batches, s, t),
            }
            for name, work in peers.items():
                rows.setdefault(name, []).append(timed(work))
            print(f"rho {rho:g}, seed {seed}: relative residual {tol:.2f}, {certificate.verdict}", flush=True)
        report(rows)


def report(rows: dict[str, list[tuple[float, int, float]]]) -> None:
    first = next(iter(rows.values()))
    columns = ("lambda_min", "products", "seconds", "spread", "x products", "x seconds")
    print(f"{'':36}" + "".join(f"{column:>14}" for column in columns))
    for name, runs in rows.items():
        products, seconds = median(r[1] for r in runs), median(r[2] for r in runs)
        ratio = products / median(r[1] for r in first), seconds / median(r[2] for r in first)
        spread = f"{min(r[2] for r in runs):.1f} to {max(r[2] for r in runs):.1f}"
        value = median(r[0] for r in runs)
        print(f"{name:36}{value:14.2e}{products:14.0f}{seconds:14.1f}{spread:>14}{ratio[0]:14.1f}{ratio[1]:14.1f}")


if __name__ == "__main__":
    main()
