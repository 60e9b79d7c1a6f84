"""Plans from the theory against the paper's exponents, Jin et al.'s formulas by hand, and a simulated run."""

import json
import math
import re
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from commandline import command, refused
from hypothesis import given
from hypothesis import strategies as st
from nightly import nightly

import packsaddle as ps
from examples.reference import algorithm1
from lab.paper.problems import Cosine, Oracle
from lab.paper.proof import predicted_escape_time
from packsaddle.theory.bounds import PRACTICAL, Assumptions, Constants, balanced_mu, first_order_plan, step_sizes
from packsaddle.theory.plans import FAMILIES, balanced_k, best_plan, plan
from packsaddle.theory.table1 import TABLE_1, Row

# Table 1 as printed: (power of d, power of eps) of mu, iterations, communication, improvement. The constant compressor
# with Lipschitz gradient has two terms, taken here where the second dominates; its improvement there is printed as d
# or 1/sqrt(eps).
PRINTED = {
    (True, "uncompressed [19]"): [(0, 0), (0, Fraction(-7, 2)), (1, Fraction(-7, 2)), (0, 0)],
    (True, "SketchTopK"): [
        (Fraction(1, 2), Fraction(3, 4)),
        (0, -4),
        (Fraction(3, 2), Fraction(-13, 4)),
        (Fraction(-1, 2), Fraction(-1, 4)),
    ],
    (True, "RandomK"): [(0, Fraction(3, 4)), (0, -4), (1, Fraction(-13, 4)), (0, Fraction(-1, 4))],
    (False, "uncompressed [25]"): [(0, 0), (1, -4), (2, -4), (0, 0)],
    (False, "SketchTopK"): [(0, Fraction(3, 4)), (1, -4), (2, Fraction(-13, 4)), (0, Fraction(-3, 4))],
    (False, "RandomK"): [
        (Fraction(-1, 2), Fraction(3, 4)),
        (1, -4),
        (Fraction(3, 2), Fraction(-13, 4)),
        (Fraction(1, 2), Fraction(-3, 4)),
    ],
    (False, "constant"): [None, (1, -4), (1, -4), (1, 0)],
}
JIN = Constants("theory", 1.0)  # Eq. (8) without its logarithm
ROWS = {(row.lipschitz, row.compressor): row for row in TABLE_1}


def slopes(f: Any, d: float, epsilon: float) -> tuple[float, float]:
    """d log f / d log d and d log f / d log epsilon by finite differences."""
    step = 1.01
    by_d = math.log(f(d * step, epsilon) / f(d, epsilon)) / math.log(step)
    return by_d, math.log(f(d, epsilon * step) / f(d, epsilon)) / math.log(step)


@pytest.mark.parametrize("key", PRINTED, ids=str)
def test_table_1_has_the_printed_exponents(key: tuple[bool, str]) -> None:
    row = ROWS[key]
    orders = (row.mu, row.iterations, row.communication, row.improvement)
    for order, expected in zip(orders, PRINTED[key], strict=True):
        if expected is None or order is None:
            assert order is expected
            continue
        assert slopes(order, 1e5, 1e-3) == pytest.approx(tuple(map(float, expected)), abs=1e-9)
    assert row.follows


def test_the_one_printed_improvement_that_does_not_follow() -> None:
    """d eps^-3.5 / (eps^-4 + d eps^-2.5) against min(d, 1/sqrt(eps)), in the four regimes of d against eps."""
    row = ROWS[True, "constant"]
    assert [r for r in TABLE_1 if not r.follows] == [row]
    assert row.printed is not None
    epsilon = 1e-8
    for d, columns, printed in ((1e2, 1e-2, 1e2), (1e6, 1e2, 1e4), (1e8, 1e4, 1e4), (1e14, 1e8, 1e4)):
        assert d * epsilon**-3.5 / (epsilon**-4 + d * epsilon**-2.5) == pytest.approx(columns, rel=0.01)
        assert row.improvement(d, epsilon) == pytest.approx(columns)
        assert row.printed(d, epsilon) == pytest.approx(printed)


@pytest.mark.parametrize("row", TABLE_1, ids=lambda r: f"{r.lipschitz}-{r.compressor}")
def test_table_1_agrees_with_the_theorems(row: Row) -> None:
    """Iterations by Theorem 3.1 or 3.2 at the row's mu, constants 1: no terms more or fewer than the row has."""
    if row.compressor == "uncompressed [19]":
        return  # another paper's
    d, epsilon = 1e6, 1e-16  # mu << 1 everywhere, as the table needs
    mu, alpha = (0.5 if row.mu is None else row.mu(d, epsilon)), 1 if row.lipschitz else d
    dimension = 1 if row.compressor == "RandomK" else d
    first, second = math.sqrt(1 - mu) / (mu * epsilon**3), dimension * (1 - mu) / (mu**2 * epsilon**2.5)
    assert 0.3 < (alpha / epsilon**4 + first + second) / row.iterations(d, epsilon) < 3
    per_step = 1 if row.mu is None else mu * d
    assert row.communication(d, epsilon) == pytest.approx(per_step * row.iterations(d, epsilon))


def test_formulas_read_as_they_evaluate() -> None:
    for row in TABLE_1:
        for order in (row.mu, row.iterations, row.communication, row.improvement, row.printed):
            if order is not None:
                product = re.sub(r"(?<=[\d.]) (?=eps)", "*", str(order).replace("d eps", "d*eps")).replace("^", "**")
                assert eval(product, {"d": 7.0, "eps": 0.3, "min": min}) == pytest.approx(order(7.0, 0.3))


@pytest.mark.parametrize("lipschitz", [None, 1.0])
@pytest.mark.parametrize("linear", [False, True])
def test_step_sizes_scale_as_table_1(lipschitz: float | None, linear: bool) -> None:
    """Balanced mu, 1 / (eta eps^2) and mu d times it against Table 1, deep in its range: corrections are O(mu)."""

    def mu(d: float, epsilon: float) -> float:
        return balanced_mu(Assumptions(round(d), epsilon, lipschitz_gradient=lipschitz), linear=linear, constants=JIN)

    def steps(d: float, epsilon: float) -> float:
        a = Assumptions(round(d), epsilon, lipschitz_gradient=lipschitz)
        return 1 / (min(step_sizes(a, JIN, mu(d, epsilon), linear=linear).values()) * epsilon**2)

    row = ROWS[lipschitz is not None, "RandomK" if linear else "SketchTopK"]
    ours = (mu, steps, lambda *at: mu(*at) * at[0] * steps(*at))
    for found, order in zip(ours, (row.mu, row.iterations, row.communication), strict=True):
        assert slopes(found, 10**8, 1e-14) == pytest.approx(slopes(order, 10**8, 1e-14), abs=1e-4)
        assert order is not None
        assert found(10**8, 1e-14) == pytest.approx(order(10**8, 1e-14), rel=1e-4)


problems = st.builds(
    Assumptions,
    d=st.integers(2, 10**6),
    epsilon=st.floats(1e-3, 0.5),
    smoothness=st.floats(1.0, 50.0),
    hessian_lipschitz=st.floats(0.1, 1.5),
    sigma=st.floats(0.0, 3.0),
    f_max=st.floats(0.1, 100.0),
    lipschitz_gradient=st.none() | st.floats(0.5, 50.0),
)
modes = st.sampled_from([PRACTICAL, JIN, replace(JIN, iota=4.0)])


@given(problems, modes, st.booleans())
def test_balanced_mu_equalises_the_first_and_third_terms(a: Assumptions, c: Constants, linear: bool) -> None:
    mu = balanced_mu(a, linear=linear, constants=c)
    assert 0 < mu < 1
    if mu < 1 - 1e-6:  # nearer to 1 the difference 1 - mu has lost its digits
        terms = step_sizes(a, c, mu, linear=linear)
        assert terms["second-order"] == pytest.approx(terms["gradient noise"], rel=1e-6)


def test_without_compression_a_plan_is_jin_et_al() -> None:
    """Eq. (8) by hand: L = rho = sigma = l-tilde = 1, epsilon = 0.1, iota = 1: N = 1 + 100 + 1 / sqrt(0.1)."""
    p = plan(Assumptions(10_000, 0.1, lipschitz_gradient=1.0), ps.Identity(), constants=JIN, workers=3)
    n = 101 + 10**0.5
    assert p.eta == pytest.approx(1 / n)
    assert p.interval == math.ceil(n / 0.1**0.5)
    assert p.steps == math.ceil(100 * p.interval / 0.1**1.5)
    assert p.radius == pytest.approx(2 * 0.1**0.5)
    assert p.decrease == pytest.approx(0.1**1.5)
    assert p.noise * 100 == pytest.approx(0.1 * n**0.5)  # sqrt(d) = 100
    assert p.noise_norm == pytest.approx(0.1 * n**0.5)
    assert p.noise_suffices
    assert not replace(p, noise=0.001).noise_suffices
    # iota as printed, where that is usable, and its powers.
    a = Assumptions(1000, 0.1, lipschitz_gradient=1.0)
    c = Constants.theory(a, failure_probability=0.05)
    assert c.iota == pytest.approx(math.log(1000 * n / (0.1 * 0.05)))
    large = plan(a, ps.Identity(), constants=c)
    assert large.eta == pytest.approx(1 / (n * c.iota**9))
    assert large.radius == pytest.approx(2 * 0.1**0.5 / c.iota**2)
    assert large.decrease == pytest.approx(0.1**1.5 / c.iota**5)
    assert large.interval == pytest.approx(c.iota**10 * n / 0.1**0.5)
    assert large.steps == pytest.approx(c.iota**15 * 100 * n / 0.01)
    with pytest.raises(ValueError, match=re.escape("failure_probability must be in (0, 1), got 1")):
        Constants.theory(a, failure_probability=1.0)
    # In other units of f the printed argument is d L f_max N / (rho epsilon delta) = 2e-9 / delta.
    tiny = Assumptions(1, 0.1, sigma=0.0, f_max=1e-10)
    assert Constants.theory(tiny, 0.5).iota == pytest.approx(math.log(1 / 0.1**0.5 / 0.5))
    assert (p.mu, p.k, p.bound_by, p.improvement, p.theorem) == (1.0, 10_000, "gradient noise", 1.0, "3.2")
    assert p.total == p.steps * round(2 * 2 / 3 * 40_000)


def test_practical_plans_are_first_order_plans_and_wait_for_escapes() -> None:
    """Eta and T satisfy the proved bounds for epsilon / 2; I is twice the worst saddle's median escape time."""
    for lipschitz in (None, 1.0):
        for compressor in (ps.Identity(), ps.RandomK(0.05), ps.TopK(0.05)):
            a = Assumptions(400, 0.1, lipschitz_gradient=lipschitz)
            p = plan(a, compressor)
            proved = first_order_plan(replace(a, epsilon=0.05), p.mu, noise=p.noise)
            assert p.eta <= proved.eta
            assert p.steps >= 8 / (p.eta * 0.05**2)
            assert p.interval == math.ceil(2 * predicted_escape_time(p.eta, 0.1**0.5, p.noise, p.radius))
            assert p.decrease == pytest.approx(2 / 3 * 0.1**1.5)
            assert p.steps >= 4 * p.interval / p.decrease


@given(
    problems,
    modes,
    st.sampled_from([ps.RandomK(0.1), ps.TopK(0.1), ps.SketchTopK(0.1), ps.LinearSketch(0.1), ps.Sign()]),
)
def test_steps_fall_with_easier_problems(a: Assumptions, c: Constants, compressor: Any) -> None:
    base = plan(a, compressor, constants=c)
    easier = [
        replace(a, epsilon=a.epsilon * 1.2),
        replace(a, f_max=a.f_max / 2),
        replace(a, sigma=a.sigma / 2),
        replace(a, lipschitz_gradient=1.0 if a.lipschitz_gradient is None else a.lipschitz_gradient / 2),
    ]
    # With less noise in the gradients the planned noise is less too, a hundredth of it where sigma is replaced by a
    # Lipschitz constant, and escapes take a logarithm longer: found up to 1.50001 times.
    slack = 1.0 if c.patience is None else 2.0
    for other in easier:
        assert plan(other, compressor, constants=c).steps <= slack * base.steps
    assert plan(replace(a, smoothness=2 * a.smoothness), compressor, constants=c).steps >= base.steps
    assert plan(a, ps.Identity(), constants=c).steps <= base.steps
    assert base.noise_suffices
    assert base.interval * base.eta * a.curvature >= c.iota * (1 - 1e-12)


@given(
    problems,
    modes,
    st.sampled_from(["RandomK", "TopK", "SketchTopK", "SharedTopK", "LinearSketch"]),
    st.integers(2, 9),
    st.data(),
)
def test_no_k_beats_the_best_plan(a: Assumptions, c: Constants, family: str, workers: int, data: st.DataObject) -> None:
    """Tolerance: bytes on the wire are rounded (half a byte of at least 4), and LinearSketch's mu goes in jumps."""
    best = best_plan(a, FAMILIES[family], constants=c, workers=workers)
    slack = 0.95 if family == "LinearSketch" else 0.98
    grid = {round(a.d ** (i / 12)) for i in range(13)} | {data.draw(st.integers(1, a.d))}
    for k in {*grid, balanced_k(a, FAMILIES[family], constants=c)}:
        assert plan(a, FAMILIES[family](k), constants=c, workers=workers).total >= slack * best.total, k


def test_best_is_balanced_where_corollary_3_3_applies_and_clipped_elsewhere() -> None:
    a = Assumptions(10**6, 0.1)
    # sqrt(d) eps^(3/4) = 177.8, and an eighth of it where the first term carries 1/64.
    assert (
        best_plan(a, FAMILIES["RandomK"], constants=JIN).k == balanced_k(a, FAMILIES["RandomK"], constants=JIN) == 178
    )
    assert balanced_k(a, FAMILIES["RandomK"]) == 23
    assert best_plan(a, FAMILIES["RandomK"]).k == 22  # 22.2 in whole numbers
    assert balanced_k(replace(a, d=1), FAMILIES["TopK"]) == 1
    assert best_plan(Assumptions(50, 1e-4), FAMILIES["RandomK"]).k == 1  # d mu = 7e-3
    # The first-order term binds longest with much smoothness and noise; Corollary 3.3 does not see it.
    a = Assumptions(10**6, 0.9, hessian_lipschitz=1.1, sigma=0.0, lipschitz_gradient=1.0)
    best, balanced = best_plan(a, FAMILIES["RandomK"]), balanced_k(a, FAMILIES["RandomK"])
    assert best.k is not None
    assert best.k != balanced
    assert best.total < plan(a, ps.RandomK(k=balanced)).total


@pytest.mark.parametrize(
    "compressor",
    [ps.RandomK(0.1), ps.TopK(0.1), ps.SketchTopK(0.1), ps.SharedTopK(0.1), ps.QSGD(), ps.Identity()],
    ids=repr,
)
def test_bytes_are_those_of_a_run(compressor: Any) -> None:
    """One step of three workers on 3000 coordinates; tolerance: coded indices and levels and padding vary."""

    def step(rank: int) -> int:
        x = torch.nn.Parameter(torch.zeros(3000))
        x.grad = torch.randn(3000, generator=torch.Generator().manual_seed(rank))
        opt = ps.CompressedSGD([x], 0.1, ps.Compression(compressor, dense_below=0, max_skipped=None))
        before = opt.ledger.total.sent
        opt.step()
        return opt.ledger.total.sent - before

    sent = max(ps.simulate(step, 3))
    expected = plan(Assumptions(3000, 0.1), compressor, workers=3).sent
    assert expected == pytest.approx(sent, rel=0.02 if isinstance(compressor, ps.TopK | ps.QSGD) else 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("sigma", "epsilon", "k"), [nightly(0.5, 0.8, 1), (2.0, 1.0, 2), nightly(2.0, 1.0, 4)])
def test_the_first_order_plan_keeps_its_promise(sigma: float, epsilon: float, k: int) -> None:
    """Cosine from near its maximum with RandomK, averaged over seeds; f_max is what f can fall by from there."""
    problem, x = Cosine(4), torch.full((4,), 3.0, dtype=torch.float64)
    a = Assumptions(4, epsilon, sigma=sigma, f_max=float(problem(x)))
    p = first_order_plan(a, ps.RandomK(k=k).mu(4))

    def mean_square(eta: float, steps: int) -> float:
        total = 0.0
        for seed in range(3):
            oracle = Oracle(problem, sigma=sigma, seed=seed)
            gradients = [lambda x, t, oracle=oracle: oracle.gradient(x, step=t)]
            trace = algorithm1(x, gradients, ps.RandomK(k=k), eta=eta, steps=steps, seed=seed)
            total += float(problem.gradient(torch.stack(trace.x[:-1])).square().sum(1).mean()) / 3
        return total

    assert mean_square(p.eta, p.steps) <= epsilon**2
    assert mean_square(p.eta, p.steps // 16) > epsilon**2  # so the steps are not idle


def test_first_order_terms_by_hand() -> None:
    a = Assumptions(100, 0.1, smoothness=2.0, sigma=3.0, f_max=5.0)
    dense = first_order_plan(a, 1.0)
    assert dense.eta == pytest.approx(0.01 / (8 * 2 * 9))
    assert dense.steps == math.ceil(8 * 5 / (dense.eta * 0.01))
    assert dense.bound_by == "gradient noise"
    assert first_order_plan(a, 1.0, noise=0.4).eta == pytest.approx(0.01 / (8 * 2 * 25))  # chi^2 = 9 + 100 * 0.16
    sparse = first_order_plan(a, 0.01)
    assert sparse.eta == pytest.approx(0.01 * 0.1 / (4 * math.sqrt(2 * 0.99) * 2 * 3))
    assert sparse.bound_by == "first-order"
    quiet = replace(a, sigma=0.0)
    assert first_order_plan(quiet, 1.0).eta == 1 / 8
    assert first_order_plan(quiet, 0.5).eta == pytest.approx(0.5 / (8 * math.sqrt(0.5)))
    assert first_order_plan(quiet, 0.5).bound_by == "error feedback"


def test_plan_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("plan", "theory", "--d", 1_000_000, "--epsilon", 0.1) == 0
    out = capsys.readouterr().out
    for text in ("RandomK", "TopK*", "LinearSketch", "22", "gradient noise", "Not covered by the proofs"):
        assert text in out
    for name in ("identity", "sign", "qsgd", "lowrank", "RandomK"):
        assert command("plan", "theory", "--d", 500, "--epsilon", 0.5, "--compressor", name) == 0
        assert name.lower() in capsys.readouterr().out.lower()


def test_a_plan_that_nobody_can_follow_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Above 1e9 steps of the plan without compression: with the numbers of plans on easier terms, and code 0."""
    assert command("plan", "theory", "--d", 1_000_000, "--epsilon", 0.1) == 0
    said = " ".join(capsys.readouterr().out.split())
    fewest = plan(Assumptions(1_000_000, 0.1), ps.Identity()).steps
    times = fewest / plan(Assumptions(1_000_000, 0.2), ps.Identity()).steps
    assert f"OUT OF REACH: the uncompressed plan needs {fewest:.1e} steps" in said
    assert "over the limit of 1e+09 (12 days at 1,000 steps a second)" in said
    assert f"twice the epsilon needs 1/{times:.3g} of the steps" in said
    assert "No epsilon that is valid for this L and rho is within reach" in said  # 8e9 steps at 1, the greatest
    lipschitz = plan(Assumptions(1_000_000, 0.1, lipschitz_gradient=1.0), ps.Identity()).steps
    assert f"--lipschitz-gradient 1): {lipschitz:.1e} steps" in said
    assert "The theory is cautious" in said
    assert command("plan", "theory", "--d", 1_000_000, "--epsilon", 0.1, "--lipschitz-gradient", 1) == 0
    assert "OUT OF REACH" not in capsys.readouterr().out


def test_an_epsilon_within_reach_is_a_valid_one(capsys: pytest.CaptureFixture[str]) -> None:
    """L^2 / rho, above which every first-order stationary point is second-order stationary, exceeds 1e20 here."""
    asked = ("--d", 1000, "--smoothness", 1e15, "--json")
    assert command("plan", "theory", *asked, "--epsilon", 1) == 0
    found = json.loads(capsys.readouterr().out)["reach"]["epsilon"]
    for epsilon, beyond in ((1.01 * found, False), (0.99 * found, True)):
        assert command("plan", "theory", *asked, "--epsilon", epsilon) == 0
        assert json.loads(capsys.readouterr().out)["out_of_reach"] == beyond


def test_within_reach_from_the_stated_epsilon_on(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--d", 1_000_000, "--lipschitz-gradient", 1)
    assert command("plan", "theory", *asked, "--epsilon", 0.01) == 0
    (stated,) = re.findall(r"Within reach: about --epsilon ([\d.e-]+) and larger", capsys.readouterr().out)
    for epsilon, beyond in ((float(stated), False), (0.95 * float(stated), True)):
        assert command("plan", "theory", *asked, "--epsilon", epsilon, "--json") == 0
        document = json.loads(capsys.readouterr().out)
        assert document["out_of_reach"] == beyond
        assert min(p["steps"] for p in document["plans"]) == document["plans"][0]["steps"]
        assert (document["plans"][0]["steps"] > 1e9) == beyond
    assert command("plan", "theory", *asked, "--epsilon", 0.01, "--mode", "theory") == 0
    assert "OUT OF REACH" in capsys.readouterr().out


def test_json_is_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--d", 5000, "--epsilon", 0.2, "--lipschitz-gradient", 2, "--sigma", 0.5, "--workers", 3)
    assert command("plan", "theory", *asked, "--compressor", "topk", "--ratio", 0.02, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    a = Assumptions(**document["assumptions"])
    assert a == Assumptions(5000, 0.2, sigma=0.5, lipschitz_gradient=2.0)
    assert Constants(**document["constants"]) == PRACTICAL
    dense, top = document["plans"]
    for shown, compressor in ((dense, ps.Identity()), (top, ps.TopK(0.02))):
        expected = plan(a, compressor, workers=3)
        for name in ("mu", "k", "eta", "steps", "interval", "radius", "noise", "decrease", "sent", "total", "bound_by"):
            assert shown[name] == getattr(expected, name), name
    assert top["balanced_k"] == balanced_k(a, FAMILIES["TopK"])
    assert (top["compressor"], top["theorem"], top["proved_for_workers"]) == ("TopK(ratio=0.02)", "3.1", False)
    assert top["improvement"] == dense["total"] / top["total"]
    assert top["first_order"]["steps"] == first_order_plan(a, 0.02).steps


def test_table_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("plan", "table", "--d", 10_000, "--epsilon", 1e-4) == 0
    out = capsys.readouterr().out
    assert out.count("The paper prints another improvement for constant, with Assumption C: min(1/eps^0.5, d)") == 1
    assert out.count(" !  ") == 1  # non-Lipschitz RandomK: k = sqrt(d) eps^(3/4) = 0.1
    assert "no such compressor exists" in out
    assert command("plan", "table", "--d", 1_000_000, "--epsilon", 0.1) == 0
    assert capsys.readouterr().out.count(" !  ") == 1  # Lipschitz SketchTopK: mu = sqrt(d) eps^(3/4) = 178
    assert command("plan", "table", "--d", 10_000, "--epsilon", 1e-4, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["table"]
    assert len(rows) == 8
    assert rows[2]["communication"] == pytest.approx(1e4 * 1e13)
    assert rows[6]["formulas"]["communication"] == "d^1.5/eps^3.25"
    assert [row["printed_follows"] for row in rows] == [True, True, True, False, True, True, True, True]


REFUSALS = {
    "theory --d 0 --epsilon 0.1": "d must be an integer from 1 to 1e15, got 0",
    "theory --d 10 --epsilon nan": "epsilon must be positive, from 1e-20 to 1e+20, got nan",
    "theory --d 10 --epsilon 2": "smoothness must be at least sqrt(hessian_lipschitz * epsilon) = 1.41421",
    "theory --d 10 --epsilon 0.1 --sigma -1": "sigma must be from 0 to 1e+20, got -1.0",
    "theory --d 10 --epsilon 0.1 --workers 1": "workers must be at least 2",
    "theory --d 10 --epsilon 0.1 --compressor topkk": "got 'topkk' (did you mean topk?)",
    "theory --d 10 --epsilon 0.1 --compressor topk --ratio 2": "ratio of TopK must be in (0, 1], got 2.0",
    "theory --d 10 --epsilon 0.1 --compressor sign --ratio 0.5": "ratio is for one of randomk",
    "table --d 10 --epsilon 1.5": "epsilon must be at least 1e-20 and below 1 for the orders of Table 1, got 1.5",
    "table --d 10 --epsilon 1e-90": "epsilon must be at least 1e-20 and below 1 for the orders of Table 1, got 1e-90",
    "table --d 10000000000000000 --epsilon 0.1": "d must be from 1 to 1e15, got 10000000000000000",
}


@pytest.mark.parametrize(("words", "message"), REFUSALS.items(), ids=REFUSALS)
def test_bad_input_is_one_line_and_code_2(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert not refused(capsys, message, "plan", *words.split())
