"""CompressedSGD as a torch optimizer: state, schedulers, groups, closures, dense tensors, refusals."""

import io
from typing import Any

import pytest
import torch
from torch import nn

from packsaddle import CompressedSGD, Escape, Identity, Ramp, RandomK, TopK


def problem(seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    """A small network in double precision and a fixed batch."""
    rng = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 6)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3, generator=rng)
    return model, torch.randn(16, 6, generator=rng, dtype=torch.float64)


def train(model: nn.Module, data: torch.Tensor, opt: CompressedSGD, steps: int, scheduler: Any = None) -> None:
    for _ in range(steps):
        opt.zero_grad()
        (model(data) - data).square().mean().backward()
        opt.step()
        if scheduler:
            scheduler.step()


def make(model: nn.Module, data: torch.Tensor, **changes: Any) -> CompressedSGD:
    arguments: dict[str, Any] = {
        "compressor": RandomK(0.1),
        "noise": Ramp(0.1, 5, 20),
        "escape": Escape(4, 0.5, lambda: (model(data) - data).square().mean()),
        "dense_below": 100,
        "seed": 3,
    }
    return CompressedSGD(model.named_parameters(), 0.1, **{**arguments, **changes})


def vector(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


@pytest.mark.parametrize("compressor", [RandomK(0.1), TopK(0.1), Identity()], ids=repr)
def test_resuming_is_bit_equal(compressor: Any) -> None:
    model, data = problem()
    opt = make(model, data, compressor=compressor)
    train(model, data, opt, 7)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, buffer)
    train(model, data, opt, 8)

    saved = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    resumed, _ = problem(seed=1)
    resumed.load_state_dict(saved["model"])
    again = make(resumed, data, compressor=compressor)
    again.load_state_dict(saved["optimizer"])
    train(resumed, data, again, 8)
    assert torch.equal(vector(resumed), vector(model))
    assert torch.equal(again.error(), opt.error())
    assert (again.steps, again.ledger.by_purpose["values"]) == (15, opt.ledger.by_purpose["values"])
    assert again.param_groups[0].keys() == opt.param_groups[0].keys()


def test_state_keeps_its_precision() -> None:
    """torch would cast the float32 error memory of bfloat16 parameters to bfloat16."""
    model, data = nn.Linear(40, 40).bfloat16(), torch.randn(8, 40).bfloat16()
    opt = CompressedSGD(model.parameters(), 0.1, compressor=RandomK(0.1))
    train(model, data, opt, 3)
    resumed = CompressedSGD(nn.Linear(40, 40).bfloat16().parameters(), 0.1, compressor=RandomK(0.1))
    resumed.load_state_dict(opt.state_dict())
    assert opt.error().dtype == torch.float32
    assert torch.equal(resumed.error(), opt.error())


def test_state_that_does_not_fit_changes_nothing() -> None:
    model, data = problem()
    opt = make(model, data)
    train(model, data, opt, 3)
    error, state = opt.error(), opt.state_dict()
    with pytest.raises(ValueError, match="seed is 3, but the state was saved under seed 4"):
        opt.load_state_dict(make(problem()[0], data, seed=4).state_dict())
    with pytest.raises(ValueError, match=r'state "anchor" of 0\.weight must have shape \(20, 6\), found nothing'):
        opt.load_state_dict(make(problem()[0], data, escape=None).state_dict())
    other = CompressedSGD(nn.Linear(20, 6).parameters(), 0.1, compressor=Identity(), seed=3)
    with pytest.raises(ValueError, match=r"must have shape \(20, 6\), found shape \(6, 20\)"):
        opt.load_state_dict(other.state_dict())
    assert torch.equal(opt.error(), error)
    opt.load_state_dict(state)


def test_changing_the_learning_rate_keeps_y_and_rescales_e() -> None:
    model, data = problem()
    opt = make(model, data, escape=None)
    train(model, data, opt, 5)
    y, e = opt.corrected(), opt.error()
    opt.param_groups[0]["lr"] = 0.02
    assert torch.equal(opt.corrected(), y)
    assert torch.allclose(opt.error(), e * (0.1 / 0.02))
    opt.param_groups[0]["lr"] = 0.0  # a warm-up from zero
    assert torch.equal(opt.corrected(), y)
    with pytest.raises(RuntimeError, match="error\\(\\) divides by the learning rate, which is 0"):
        opt.error()


def test_scheduler() -> None:
    """With a scheduler, y still moves by exactly -eta_t (grad + xi_t): here no noise, so y_T is a plain sum."""
    model, data = problem()
    opt = make(model, data, escape=None, noise=0.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    expected = vector(model)
    for t in range(6):
        opt.zero_grad()
        (model(data) - data).square().mean().backward()
        expected -= 0.1 * 0.5**t * torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
        opt.step()
        scheduler.step()
    assert torch.allclose(opt.corrected(), expected, rtol=1e-12, atol=1e-14)


def test_groups_have_their_own_rates() -> None:
    """y moves by each group's own eta (grad + weight_decay x), whatever the layout; e is in units of a gradient."""
    ps = [nn.Parameter(torch.full(shape, 2.0, dtype=torch.float64)) for shape in ((4, 5), (3,), (6, 2))]
    groups = [{"params": ps[:2], "lr": 0.5}, {"params": ps[2:], "weight_decay": 0.25}]
    opt = CompressedSGD(groups, 0.1, compressor=RandomK(k=2), dense_below=4)
    for p in ps:
        p.grad = torch.ones_like(p)
    opt.step()
    y = torch.cat([torch.full((23,), 2.0 - 0.5), torch.full((12,), 2.0 - 0.1 * (1 + 0.25 * 2))]).double()
    assert torch.allclose(opt.corrected(), y)
    e, x = opt.error(), nn.utils.parameters_to_vector(ps).detach()
    # Two coordinates were sent; the vector (3,) went dense. All others hold grad + weight_decay x.
    assert int((e[:20] == 0).sum() + (e[23:] == 0).sum()) == 2
    assert not e[20:23].any()
    assert set(e.round(decimals=12).tolist()) <= {0.0, 1.0, 1.5}
    assert torch.allclose(x[20:23], y[20:23])


def test_dense_tensors_bytes_and_mu() -> None:
    model = nn.Sequential(nn.Linear(50, 40), nn.LayerNorm(40), nn.Linear(40, 4))  # 2000 | 40 40 40 160 4
    opt = CompressedSGD(model.parameters(), 0.1, compressor=RandomK(0.01))
    (model(torch.ones(2, 50)).sum()).backward()
    opt.step()
    assert (opt.numel, opt.compressed_numel) == (2284, 2000)
    moved = opt.ledger.at(0)
    assert moved["values"].payload == 20 * 4
    assert moved["dense"].payload == 284 * 4
    assert moved["dense"].sent == 0  # one worker
    assert opt.mu == pytest.approx((20 + 284) / 2284)


def test_mu_is_the_contraction_of_even_vectors() -> None:
    """Measured on the optimizer itself: gradients of Gaussian entries, first step, over seeds."""
    lost = []
    for seed in range(300):
        ps = [nn.Parameter(torch.zeros(30, 10)), nn.Parameter(torch.zeros(30))]
        opt = CompressedSGD(ps, 1.0, compressor=RandomK(0.2), seed=seed, dense_below=1)
        for p in ps:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        total = sum(float(p.grad.square().sum()) for p in ps if p.grad is not None)
        opt.step()
        lost.append(float(opt.error().square().sum()) / total)
    assert sum(lost) / len(lost) == pytest.approx(1 - opt.mu, abs=0.01)


def test_closure_and_parameters_without_gradient() -> None:
    used, unused = nn.Parameter(torch.ones(3, 1)), nn.Parameter(torch.ones(2, 1))
    opt = CompressedSGD([used, unused], 0.1, compressor=Identity(), dense_below=0)

    def closure() -> float:
        opt.zero_grad()
        loss = used.sum() * 2
        loss.backward()
        return loss.item()

    assert opt.step(closure) == 6.0
    assert torch.allclose(used, torch.full((3, 1), 0.8))
    assert torch.equal(unused, torch.ones(2, 1))


def test_frozen_later_stays_where_it_is() -> None:
    a, b = nn.Parameter(torch.ones(5, 1)), nn.Parameter(torch.ones(5, 1))
    opt = CompressedSGD([a, b], 0.1, compressor=TopK(k=1), noise=0.5, dense_below=0)
    a.grad, b.grad = torch.ones(5, 1), torch.ones(5, 1)
    opt.step()
    b.requires_grad_(False)
    frozen = b.clone()
    for _ in range(10):
        opt.step()
    assert torch.equal(b, frozen)
    assert not torch.equal(a, torch.ones(5, 1))


def test_gradient_accumulation_is_the_sum() -> None:
    results = []
    for passes in (1, 2):
        model, data = problem()
        opt = make(model, data, escape=None)
        for part in data.chunk(passes):
            (model(part) - part).square().sum().backward()
        opt.step()
        results.append(vector(model))
    assert torch.allclose(*results, rtol=1e-12)


def test_gradients_are_left_alone() -> None:
    model, data = problem()
    opt = make(model, data)
    (model(data) - data).square().mean().backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    opt.step()
    assert all(torch.equal(b, p.grad) for b, p in zip(before, model.parameters(), strict=True) if p.grad is not None)


def test_global_random_state_is_untouched() -> None:
    model, data = problem()
    state = torch.random.get_rng_state()
    train(model, data, make(model, data), 6)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_refusals() -> None:
    w = nn.Parameter(torch.ones(40, 40))
    with pytest.raises(ValueError, match=r"lr must be finite and not negative, got -0\.1"):
        CompressedSGD([w], -0.1)
    with pytest.raises(ValueError, match="weight_decay must be finite and not negative, got nan"):
        CompressedSGD([w], 0.1, weight_decay=float("nan"))
    with pytest.raises(ValueError, match="noise must be finite and not negative, got -1"):
        CompressedSGD([w], 0.1, noise=-1.0)
    with pytest.raises(ValueError, match="dense_below must be 0 or more elements, got -1"):
        CompressedSGD([w], 0.1, dense_below=-1)
    with pytest.raises(ValueError, match=r"k of RandomK must be at most d = 1600 \(the coordinates\), got 2000"):
        CompressedSGD([w], 0.1, compressor=RandomK(k=2000))
    with pytest.raises(ValueError, match="compressor must be a packsaddle Compressor"):
        CompressedSGD([w], 0.1, compressor=0.01)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"floating point, but parameter 0 is torch\.int64"):
        CompressedSGD([torch.ones(3, dtype=torch.int64)], 0.1)
    with pytest.raises(ValueError, match="empty parameter list"):
        CompressedSGD([], 0.1)
    opt = CompressedSGD([w], 0.1)
    with pytest.raises(RuntimeError, match="takes all its parameters at construction"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    embedding = nn.Embedding(50, 40, sparse=True)
    opt = CompressedSGD(embedding.named_parameters(), 0.1)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="weight has a sparse gradient"):
        opt.step()


def test_nothing_to_compress_is_said() -> None:
    with pytest.warns(UserWarning, match=r"nothing will be compressed.*dense_below=1024"):
        CompressedSGD([nn.Parameter(torch.ones(3, 3))], 0.1)
