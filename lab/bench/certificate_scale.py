"""A certificate of a transformer in a common setting: 10.7 million parameters, fused attention, compiled, FSDP2.

    python -m lab.bench.certificate_scale --out scale.csv [--sequences 16] [--only CASE ...]

Weights (after some steps of AdamW on Python's reference text) and sequences are the same in all cases. Each case runs
in a separate process, or two on gloo: packsaddle on two shards, compiled, with fused attention; packsaddle in one
process (compiled; or by double backward, with plain attention); hessian-eigenthings, and curvlinops with scipy's eigsh,
which need double backward and so plain attention. The peers must reach packsaddle's relative residual, and get the
number of steps if they need it; none of them bounds an eigenvalue from the other side. Rows: verdict or value,
products, seconds of the search without compiling, and the increase of the process's peak memory.
"""

import argparse
import csv
import importlib
import math
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from packsaddle import certify
from packsaddle.curvature import Search

WIDTH, DEPTH, HEADS, CONTEXT, STEPS = 384, 6, 6, 128, 60
RESIDUAL = 0.2  # ||H v - lambda v|| / |lambda| that each case must reach
CASES = ("sharded", "compiled", "double-backward", "eigenthings", "curvlinops")
COLUMNS = ("case", "workers", "lambda_min", "verdict", "products", "passes", "seconds", "peak_mib", "first_call_s")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, t, WIDTH))
        y: Tensor = x + self.down(functional.gelu(self.up(self.norm2(x))))
        return y


class Gpt(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.tokens(x) + self.places.weight[: x.shape[1]]
        for block in self.blocks:
            y = block(y)
        logits: Tensor = self.head(self.norm(y))
        return logits


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1])
    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1))


def characters() -> tuple[Tensor, int]:
    """Return the topics of pydoc's help as int64 character codes, and the number of codes."""
    topics = importlib.import_module("pydoc_data.topics").topics
    whole = "\n".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")
    known, found = torch.frombuffer(bytearray(whole), dtype=torch.uint8).unique(return_inverse=True)
    return found, len(known)


def sequences(data: Tensor, n: int, seed: int) -> Tensor:
    """Return sequences from random positions, int64[n, CONTEXT + 1]."""
    starts = torch.randint(len(data) - CONTEXT - 1, (n,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([data[s : s + CONTEXT + 1] for s in starts])


def train(file: Path) -> None:
    data, vocabulary = characters()
    torch.manual_seed(0)
    model = Gpt(vocabulary)
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_fn(model, sequences(data, 8, 1000 + step))
        loss.backward()
        optimizer.step()
    print(f"trained {STEPS} steps, loss {loss.item():.3f}, {sum(p.numel() for p in model.parameters()):,} parameters")
    torch.save(model.state_dict(), file)


def measure(case: str, weights: Path, n: int, products: int) -> dict[str, Any]:
    data, vocabulary = characters()
    model = Gpt(vocabulary)
    model.load_state_dict(torch.load(weights))
    batches = list(sequences(data, n, 7).split(4))
    kernel = SDPBackend.FLASH_ATTENTION if case in ("sharded", "compiled") else SDPBackend.MATH
    with sdpa_kernel(kernel):
        if case in ("sharded", "compiled", "double-backward"):
            return certified(case, model, batches)
        first = time.perf_counter()
        loss_fn(model, batches[0]).backward()
        model.zero_grad()
        first, before, begin = time.perf_counter() - first, peak(), time.perf_counter()
        value, count = (eigenthings if case == "eigenthings" else curvlinops)(model, batches, products)
    seconds = time.perf_counter() - begin
    return row(case, 1, value, "", count, 2 * count, seconds, peak() - before, first)


def certified(case: str, model: nn.Module, batches: list[Tensor]) -> dict[str, Any]:
    workers, mine = 1, batches
    if case == "sharded":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        dist.init_process_group("gloo")
        workers, mine = dist.get_world_size(), batches[dist.get_rank() :: dist.get_world_size()]
        mesh = init_device_mesh("cpu", (workers,))
        for block in model.blocks:  # type: ignore[union-attr]
            block.compile()
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif case == "compiled":
        for block in model.blocks:  # type: ignore[union-attr]
            block.compile()
    first = time.perf_counter()
    certify(model, loss_fn, mine[:1], search=Search(max_hvps=1, hvp="auto", generator=torch.Generator().manual_seed(0)))
    first, before = time.perf_counter() - first, peak()
    c = certify(
        model,
        loss_fn,
        mine,
        hessian_lipschitz=1e-2,
        search=Search(
            tolerance=RESIDUAL,
            max_hvps=100,
            hvp="double-backward" if case == "double-backward" else "auto",
            generator=torch.Generator().manual_seed(0),
        ),
    )
    used = peak() - before
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(c, flush=True)
        print(f"residual / lambda {c.residual / abs(c.lambda_min_upper):.2f}", flush=True)
    return row(case, workers, c.lambda_min_upper, str(c.verdict), c.hvps, c.backward_passes, c.seconds, used, first)


def eigenthings(model: nn.Module, batches: list[Tensor], products: int) -> tuple[float, int]:
    from hessian_eigenthings import HessianOperator, lanczos

    operator = HessianOperator(model, batches, loss_fn)
    found = lanczos(operator, k=1, which="SA", max_iter=products, tol=RESIDUAL, seed=0, reorthogonalize=True)
    print(f"relative residual {float(found.residuals[0]) / abs(float(found.eigenvalues[0])):.2f}", flush=True)
    return float(found.eigenvalues[0]), int(found.iterations)


def curvlinops(model: nn.Module, batches: list[Tensor], products: int) -> tuple[float, int]:
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import LinearOperator, eigsh

    class Flat(nn.Module):
        """A module that returns the logits in cross_entropy's shape."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).flatten(0, 1)  # type: ignore[no-any-return]

    pairs = [(b[:, :-1], b[:, 1:].reshape(-1)) for b in batches]
    flat = Flat()
    plain = HessianLinearOperator(
        flat, nn.CrossEntropyLoss(), list(flat.parameters()), pairs, check_deterministic=False
    ).to_scipy()
    count = 0

    def matvec(v: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        product: np.ndarray = plain @ v.astype(np.float32)
        return product

    operator = LinearOperator(plain.shape, matvec=matvec, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(plain.shape[0])
    value = eigsh(operator, k=1, which="SA", tol=RESIDUAL, v0=start, return_eigenvectors=False)[0]
    return float(value), count


def peak() -> float:
    """Return this process's peak resident set, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def row(*values: Any) -> dict[str, Any]:
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sequences", type=int, default=16, help=f"of {CONTEXT} characters, in batches of 4")
    parser.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--products", type=int, default=100, help=argparse.SUPPRESS)
    args = parser.parse_args()
    weights = args.out.with_suffix(".pt")
    if args.case is not None:
        torch.set_num_threads(1 if args.case == "sharded" else 2)
        found = measure(args.case, weights, args.sequences, args.products)
        if int(os.environ.get("RANK", "0")) == 0:
            new = not args.out.exists()
            with args.out.open("a", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                if new:
                    writer.writeheader()
                writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in found.items()})
        if dist.is_initialized():
            dist.destroy_process_group()
        return
    if not weights.exists():
        torch.set_num_threads(2)
        train(weights)
    products = args.products
    for case in args.only:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if case == "sharded" else []
        words = [
            "--out",
            str(args.out),
            "--sequences",
            str(args.sequences),
            "--case",
            case,
            "--products",
            str(products),
        ]
        subprocess.run([sys.executable, *launcher, __file__, *words], check=True)
        rows = {r["case"]: r for r in csv.DictReader(args.out.open())}
        if "double-backward" in rows:
            products = math.ceil(float(rows["double-backward"]["products"]))
    print(args.out.read_text())


if __name__ == "__main__":
    main()
