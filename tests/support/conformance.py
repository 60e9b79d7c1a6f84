"""The contract of a compressor, as checks on adversarial vectors that do not depend on how it is implemented."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import is_dataclass

import torch
from torch import Tensor

from packsaddle.compressors import Compressor, Message
from packsaddle.errors import MessageError

# Tolerance for means, in standard errors. A correct random compressor fails about one comparison in three million.
STANDARD_ERRORS = 5.0


def nasty_vectors() -> dict[str, Tensor]:
    """Return adversarial flat vectors, float[n], by name.

    They include squares that underflow or overflow, ties between magnitudes, and zeros of both signs.
    """
    rng = torch.Generator().manual_seed(0)
    gaussian = torch.randn(50, generator=rng)
    spike = torch.zeros(40)
    spike[17] = -3.0
    denormal = torch.full((30,), 1e-42)
    denormal[::3] *= -2
    return {
        "gaussian": gaussian,
        "double": torch.randn(33, generator=rng, dtype=torch.float64),
        "half": torch.randn(20, generator=rng).to(torch.bfloat16),
        "zeros": torch.zeros(25),
        "one spike": spike,
        "all equal": torch.full((24,), 0.5),
        "ties of both signs": torch.tensor([1.0, -1.0] * 16),
        "denormal": denormal,
        "huge": gaussian * 1e30,
        "tiny": gaussian * 1e-30,
        "heavy tail": 1.0 / torch.arange(1, 61, dtype=torch.float32) ** 2,
        "wide range": torch.logspace(-30, 30, 41),
        "negative zero": torch.tensor([-0.0, 0.0, 2.0, -0.0]),
        "one coordinate": torch.tensor([-7.0]),
        "two coordinates": torch.tensor([1.0, -2.0]),
    }


def check_compressor(compressor: Compressor, vectors: Mapping[str, Tensor] | None = None, *, seeds: int = 200) -> None:
    """Check that `compressor` satisfies the contract of `Compressor`. A failed check names the property and the vector.

    `vectors` are flat floating-point tensors, by default `nasty_vectors()`. Vectors that `compressor.validate` rejects
    are skipped. Expectations are estimated by means over `seeds` draws, at least 2.
    """
    assert is_dataclass(compressor)
    hash(compressor)  # tables look compressors up
    for name, v in {**(vectors or nasty_vectors()), "no coordinate": torch.zeros(0)}.items():
        try:
            compressor.validate(len(v))
        except ValueError:
            continue
        where = f"{compressor!r} on {name!r}"
        check_purity(compressor, v, where)
        check_message(compressor, v, where)
        if name == "gaussian":  # all of whose coordinates differ
            check_codes(compressor, v, where)
        if len(v):
            check_contraction(compressor, v, where, seeds)
            check_homogeneity(compressor, v, where)
            check_declared(compressor, v, where, seeds)


def check_purity(compressor: Compressor, v: Tensor, where: str) -> None:
    """Check that C depends only on (v, seed, step), and changes neither v nor the global random state."""
    before, state = v.clone(), torch.random.get_rng_state()
    first = compressor(v, seed=1, step=2)
    assert torch.equal(torch.random.get_rng_state(), state), f"{where}: uses the global random state"
    assert torch.equal(first, compressor(v, seed=1, step=2)), f"{where}: two calls differ"
    assert torch.equal(v, before), f"{where}: changes v"


def check_message(compressor: Compressor, v: Tensor, where: str) -> None:
    """Check that sender and receiver decode the same vector, that `alpha` is a factor of it, and that a declared fixed
    size does not depend on the values of v."""
    d, scratch = len(v), v.clone()
    message = compressor.encode(scratch, seed=8, step=9)
    assert all(part.ndim == 1 for part in message.parts.values()), f"{where}: parts must be flat"
    scratch.fill_(7.0)  # a message must not be a view of v, which the error memory overwrites
    # The receiver has only the bytes, without the sender's context.
    wire = {name: part.contiguous().view(torch.uint8).clone().view(part.dtype) for name, part in message.parts.items()}
    received = compressor.receive(wire, d, seed=8, step=9)
    own, other = torch.ones_like(v), torch.ones_like(v)
    compressor.add_decoded(message, own, alpha=-2.0)
    compressor.add_decoded(received, other, alpha=-2.0)
    assert torch.equal(own, other), f"{where}: the receiver decodes something else than the sender"
    expected, tolerance = 1 - 2 * compressor(v, seed=8, step=9), 8 * torch.finfo(v.dtype).eps
    scale = 1 + _largest(v)
    assert torch.allclose(own, expected, rtol=tolerance, atol=tolerance * scale), f"{where}: alpha is not a factor"
    if compressor.fixed_size:
        zeros = compressor.encode(torch.zeros_like(v), seed=1, step=1)
        assert zeros.nbytes == message.nbytes == Message(wire).nbytes, f"{where}: is declared fixed_size"


def check_codes(compressor: Compressor, v: Tensor, where: str) -> None:
    """Check that the receiver refuses codes that the sender never writes: a message in which one bit of a packed part
    is flipped is refused, or decodes to another vector."""
    message = compressor.encode(v, seed=8, step=9)
    decoded = torch.zeros_like(v)
    compressor.add_decoded(message, decoded)
    flips = [
        (n, i, bit)
        for n, p in message.parts.items()
        if p.dtype == torch.uint8
        for i in range(len(p))
        for bit in range(8)
    ]
    for name, i, bit in flips:
        parts = {n: part.clone() for n, part in message.parts.items()}
        parts[name][i] ^= 1 << bit
        found = torch.zeros_like(v)
        with suppress(MessageError):
            compressor.add_decoded(compressor.receive(parts, len(v), seed=8, step=9), found)
            assert not torch.equal(found, decoded), f"{where}: bit {bit} of byte {i} of {name} has no meaning"


def check_contraction(compressor: Compressor, v: Tensor, where: str, seeds: int) -> None:
    """Check that 0 < mu <= 1 and E||v - C(v)||^2 <= (1 - mu) ||v||^2."""
    mu, scale = compressor.mu(len(v)), _largest(v) or 1.0
    assert 0 < mu <= 1, f"{where}: mu must be in (0, 1], got {mu}"
    lost = [_energy(v.double() - compressor(v, seed=s, step=3).double(), scale) for s in range(seeds)]
    if (energy := _energy(v.double(), scale)) == 0:
        assert max(lost) == 0, f"{where}: C(0) must be 0"
        return
    shares = torch.tensor(lost, dtype=torch.float64) / energy
    mean, error = float(shares.mean()), float(shares.std()) / seeds**0.5
    rounding = 16 * torch.finfo(v.dtype).eps
    assert mean <= 1 - mu + STANDARD_ERRORS * error + rounding, f"{where}: lost {mean:.4g} of ||v||^2, mu is {mu:.4g}"


def check_homogeneity(compressor: Compressor, v: Tensor, where: str) -> None:
    """Check that C(2 v) = 2 C(v), and if C is declared linear that C(a + b) = C(a) + C(b), up to rounding."""
    eps, subnormal = torch.finfo(v.dtype).eps, 64 * torch.finfo(v.dtype).tiny * torch.finfo(v.dtype).eps
    doubled, single = compressor(v * 2, seed=4, step=5), compressor(v, seed=4, step=5)
    assert torch.allclose(doubled, 2 * single, rtol=8 * eps, atol=subnormal), f"{where}: C(2 v) is not 2 C(v)"
    if compressor.linear:
        b = v.flip(0) * 0.5
        parts = single + compressor(b, seed=4, step=5)
        rounding = 4 * eps * float((v.double().abs() + b.double().abs()).sum()) + subnormal
        whole = compressor(v + b, seed=4, step=5)
        assert torch.allclose(whole, parts, rtol=4 * eps, atol=rounding), f"{where}: is declared linear and is not"
        assert len(compressor.encode(v, seed=0, step=0).parts) == 1, f"{where}: a linear message has one part"


def check_declared(compressor: Compressor, v: Tensor, where: str, seeds: int) -> None:
    """Check that `aggregation`, `lossless`, `rate` and `shared_cells` agree with C(v)."""
    assert compressor.aggregation != "all-reduce" or compressor.linear, f"{where}: an all-reduce needs a linear C"
    if compressor.lossless:
        assert torch.equal(compressor(v, seed=3, step=4), v), f"{where}: is declared lossless and is not"
    # rate: the set of coordinates sent is independent of v, and contains each coordinate with this probability.
    if (rate := compressor.rate(len(v))) is not None:
        # Magnitudes from 1 to 2 are not rounded to 0 in any format.
        ones = torch.ones_like(v)
        other = torch.where(v < 0, -ones, ones) * torch.linspace(1, 2, len(v)).to(v)
        sent = torch.stack([compressor(ones, seed=s, step=3) != 0 for s in range(seeds)])
        assert torch.equal(sent[0], compressor(other, seed=0, step=3) != 0), f"{where}: what is sent depends on v"
        found, spread = float(sent.double().mean()), STANDARD_ERRORS * (rate * (1 - rate) / seeds) ** 0.5
        assert abs(found - rate) <= spread + 1e-9, f"{where}: the rate is {rate:.4g}, and {found:.4g} is sent"
    # shared_cells: the message has the values of v at cells determined by (seed, step).
    if (grid := compressor.shared_cells(len(v))) is not None:
        message = compressor.encode(v, seed=3, step=4)
        assert set(message.parts) == {"values"}, f"{where}: has shared cells, and the message {list(message.parts)}"
        assert grid[0] == -(-len(v) // grid[1]), f"{where}: {grid[0]} cells of {grid[1]} are not {len(v)} coordinates"
        kept = torch.zeros_like(v)
        index = message.context.coordinates(len(v))
        kept[index] = v[index]
        assert torch.equal(compressor(v, seed=3, step=4), kept), f"{where}: sends something else than v at its cells"


def _largest(v: Tensor) -> float:
    return float(v.double().abs().max()) if len(v) else 0.0


def _energy(v: Tensor, scale: float) -> float:
    return float((v / scale).square().sum())
