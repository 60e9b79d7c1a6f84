"""A script of test_triton and make gpu: compares each loop of `numerics.kernels.triton_loops` with torch's result."""

import math

import torch
from torch import Tensor
from torch_loops import torch_only

from packsaddle import QSGD
from packsaddle.compressors import wire
from packsaddle.numerics.kernels import triton_loops
from packsaddle.numerics.seeds import Stream, add_gaussians, keys

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RNG = torch.Generator().manual_seed(0)


def vector(d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(d, generator=RNG).to(DEVICE, dtype)


def check_gaussians() -> None:
    key = keys(3, 4, Stream.NOISE)
    for dtype in (torch.float32, torch.float64):
        for n, start in ((1, 0), (5000, 0), (5000, 1023), (2048, 2048), (10, 2047)):
            ours, theirs = (torch.zeros(n, dtype=dtype, device=DEVICE) for _ in range(2))
            triton_loops.add_gaussians(ours, 0.3, key, start)
            add_gaussians(theirs, 0.3, key, start)
            assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6), (dtype, n, start)
            assert bool(theirs.any())


def check_signs() -> None:
    for d in (1, 8, 1000, 4097):
        v = vector(d)
        v[0] = math.nan
        packed = triton_loops.pack_signs(v)
        assert torch.equal(packed, wire.pack_bits(v >= 0))
        for sizes in ([d], [min(3, d), d - min(3, d)]):
            out, scales = torch.zeros(d, device=DEVICE), torch.tensor([0.7, 0.3], device=DEVICE)[: len(sizes)]
            triton_loops.add_signs(packed, sizes, scales, out)
            scale = scales.repeat_interleave(torch.tensor(sizes, device=DEVICE))
            assert torch.equal(out, torch.where(v >= 0, scale, -scale))


def check_levels() -> None:
    for compressor in (QSGD(coded=False), QSGD(1, 16, coded=False), QSGD(127, 100, coded=False)):
        for d in (1, 33, 3000):
            v = vector(d)
            if d == 3000:
                v[600], v[1200:1300] = math.nan, 0.0
            b, key = min(d, compressor.bucket), keys(1, 2, Stream.ROUNDING)
            theirs = compressor.encode(v, seed=1, step=2)
            packed, norms = triton_loops.pack_levels(v, compressor.levels, compressor.bits, b, key)
            assert torch.allclose(norms, theirs.parts["scales"], rtol=1e-6, equal_nan=True)
            codes, plain = (wire.unpack(p, compressor.bits, d) for p in (packed, theirs.parts["levels"]))
            # The sums of squares may be rounded differently, which can move a coordinate across its threshold.
            assert int((codes - plain).abs().max()) <= 1
            assert int((codes != plain).sum()) <= d // 1000
            ours, expected = (torch.zeros(d, device=DEVICE) for _ in range(2))
            parts = theirs.parts
            compressor.add_decoded(theirs, expected, 2.0)
            scale = 2.0 / (compressor.levels * (1 + compressor.omega(d)))
            triton_loops.add_levels(
                parts["levels"], compressor.levels, compressor.bits, b, parts["scales"], ours, scale
            )
            assert torch.allclose(ours, expected, rtol=1e-6, equal_nan=True)


if __name__ == "__main__":
    for check in (check_gaussians, check_signs, check_levels):
        with torch_only():
            check()
        print(check.__name__.removeprefix("check_"))
