"""Tests of Theorems 3.1 and 3.2: runs of Algorithm 1 with planned parameters on problems whose saddles are known."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

from lab.paper.problems import Cosine, Oracle, PhaseRetrieval, Problem, QuadraticQuartic
from lab.paper.proof import Method
from lab.paper.proof.trajectory import Run
from lab.pool import Report
from packsaddle.comm import choose
from packsaddle.compressors import AdaptiveTopK, Compressor, Identity, RandomK, SketchTopK, TopK
from packsaddle.theory import PRACTICAL, Assumptions, Constants, Plan, plan

SIGMA, RATIO = 0.3, 1 / 8
COMPRESSORS: dict[str, Compressor] = {
    "Identity": Identity(),
    "RandomK": RandomK(RATIO),
    "TopK": TopK(RATIO),
    "SketchTopK": SketchTopK(RATIO),
    "AdaptiveTopK": AdaptiveTopK(0.5),
}
CONSTANTS = {"practical": PRACTICAL, "iota = 1": Constants("theory", 1.0)}
# Width of the saddle of `Cosine`, in units of sqrt(epsilon). It equals the saddle's negative curvature over the
# threshold for a second-order stationary point.
WIDTH = 1.25
LOOKS = 4000  # number of iterates that are checked for stationarity, evenly spaced over the planned steps
Variant = Literal["Algorithm 1", "no noise", "interval / 100", "no error feedback"]


@dataclass(frozen=True)
class Job:
    """The settings of one run of Algorithm 1, or of a variant without one of its parts.

    `question` is "share" (run all planned steps) or "half" (stop once half of the iterates are epsilon-approximate
    second-order stationary points). The theorems apply to Algorithm 1 only; the variants show which of its parts are
    needed. With `quiet` the stochastic gradients have no noise along the cosine's direction of negative curvature.
    """

    question: str
    problem: str
    epsilon: float
    d: int
    compressor: str
    seed: int
    factor: float = 1.0  # factor of the planned step size eta; the planned interval I is divided by it
    lipschitz: bool = True  # the stochastic gradients satisfy Assumption C
    constants: str = "practical"
    variant: Variant = "Algorithm 1"
    quiet: bool = False

    def __str__(self) -> str:
        of = (
            f"{self.problem}, epsilon {self.epsilon:g}, d {self.d}, {self.compressor}, {self.variant}, seed {self.seed}"
        )
        return f"run ({of}, step size x {self.factor:g})"


def few_jobs() -> Iterator[Job]:
    """Yield runs that take about a minute together.

    They suffice for the exponents in epsilon and d of uncompressed SGD and RandomK.
    """
    for epsilon, d in ((0.4, 8), (0.3, 8), (0.2, 8), (0.4, 16), (0.4, 32)):
        for name in ("Identity", "RandomK"):
            yield Job("half", "cosine", epsilon, d, name, 0)


def all_jobs() -> Iterator[Job]:
    """Yield all runs of Table 1: two seeds of each setting, and one seed of the settings with long runs."""
    factors = (1.0, 4.0, 16.0, 64.0, 256.0)
    for name in COMPRESSORS:
        yield Job("share", "cosine", 0.4, 16, name, 0)
    for epsilon in (0.4, 0.2, 0.1, 0.05):
        yield from (Job("share", "cosine", epsilon, 16, "Identity", seed, constants="iota = 1") for seed in (0, 1))
    for name in ("Identity", "RandomK"):
        yield Job("share", "cosine", 0.2, 16, name, 0)
        yield Job("share", "phase retrieval", 0.4, 6, name, 0)
        yield Job("share", "quartic", 0.12, 8, name, 0)
        yield Job("share", "cosine", 0.4, 16, name, 1)
    for seed in range(2):
        for d in (8, 16, 32):
            for factor in (*factors, 1024.0):
                for name in ("Identity", "RandomK"):
                    yield Job("half", "cosine", 0.4, d, name, seed, factor, lipschitz=False)
        for epsilon, d in ((0.05, 16), (0.4, 16), (0.2, 16), (0.2, 8), (0.2, 32), (0.1, 16)):
            for factor in factors:
                for name in COMPRESSORS:
                    if epsilon > 0.05 or seed == 0:
                        yield Job("half", "cosine", epsilon, d, name, seed, factor)
    yield from saddle_jobs(3)


def saddle_jobs(seeds: int) -> Iterator[Job]:
    """Yield runs of Algorithm 1 and its variants from a saddle that only the artificial noise xi_t can leave.

    AdaptiveTopK has one seed only, since its runs are long.
    """
    for seed in range(seeds):
        for name in ("Identity", "RandomK", "AdaptiveTopK")[: 2 if seed else 3]:
            yield from (Job("share", "cosine", 0.4, 64, name, seed, variant=v, quiet=True) for v in get_args(Variant))


def setting(job: Job) -> tuple[Problem, torch.Tensor, Assumptions]:
    """Return the problem, the saddle from which a run starts, and the assumptions for the planner.

    The Lipschitz constants L and rho are valid in the ball in which runs remain.
    """
    lipschitz = 1.0 if job.lipschitz else None
    # The cosine's saddle is nearly as weak as the theorems allow: its curvature is 1.25 times the threshold.
    if job.problem == "cosine":
        width = WIDTH * math.sqrt(job.epsilon)
        problem: Problem = Cosine(job.d, width)
        return (
            problem,
            problem.critical_points()[1].x,
            Assumptions(job.d, job.epsilon, sigma=SIGMA, f_max=2 * width**3, lipschitz_gradient=lipschitz),
        )
    problem, ball, f_max = {
        "phase retrieval": (PhaseRetrieval(job.d), 1.2, 0.75),
        "quartic": (QuadraticQuartic(job.d), 1.3, 0.25),
    }[job.problem]
    smoothness, rho = problem.constants(ball)
    a = Assumptions(job.d, job.epsilon, smoothness, rho, SIGMA, f_max, smoothness)
    return problem, problem.critical_points()[0].x, a


def stationary(problem: Problem, x: torch.Tensor, a: Assumptions) -> bool:
    """Return True if x is an epsilon-approximate second-order stationary point (Definition 2.4).

    The smallest eigenvalue is from a closed form for `Cosine`, and from the dense Hessian for the rest.
    """
    if float(problem.gradient(x).norm()) > a.epsilon:
        return False
    if isinstance(problem, Cosine):
        return problem.lambda_min(x) >= -a.curvature
    hessian: torch.Tensor = torch.func.hessian(problem)(x)
    return float(torch.linalg.eigvalsh(hessian)[0]) >= -a.curvature


def measure(job: Job, report: Report = lambda _: None) -> dict[str, Any]:
    """Do one run, and return its settings, plan and measurements as plain types."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    problem, start, a = setting(job)
    planned = plan(a, COMPRESSORS[job.compressor], constants=CONSTANTS[job.constants])
    eta, interval = planned.eta * job.factor, max(1, math.ceil(planned.interval / job.factor))
    steps = min(math.ceil(planned.steps / job.factor), 10_000_000)
    oracle = Oracle(problem, SIGMA, lipschitz=job.lipschitz, seed=1000 + job.seed, quiet=int(job.quiet))
    if job.variant == "interval / 100":
        interval = max(1, interval // 100)
    noise = 0.0 if job.variant == "no noise" else planned.noise
    method = Method(eta, planned.compressor, noise, error_feedback=job.variant != "no error feedback")
    run = Run(oracle, method, start, seed=job.seed, segment=(interval, planned.radius))
    limit = steps if job.question == "share" else min(steps, 4 * interval)
    stride = max(1, (limit if job.question == "share" else 4 * interval) // LOOKS)
    seen = good = 0
    first = half = None
    for t in range(limit + 1):
        if t % stride == 0:
            report(t / max(1, limit))
            x = run.x
            if not bool(torch.isfinite(x).all()):
                break
            seen, good = seen + 1, good + stationary(problem, x, a)
            if first is None and good:
                first = t
            if half is None and 2 * good >= seen and good > 10:
                half = t
                if job.question == "half":
                    break
        if t < limit:
            run.advance()
    resets = run.optimizer.resets
    return {
        **asdict(job),
        "theorem": planned.theorem,
        "mu": planned.mu,
        "bound_by": planned.bound_by,
        "eta": eta,
        "interval": interval,
        "planned_steps": planned.steps,
        "planned_steps_f1": plan_for_unit_fall(a, planned).steps,
        "steps": run.optimizer.steps,
        "share": good / seen,
        "first": first,
        "half": half,
        "committed": sum(r.committed for r in resets),
        "rolled_back": sum(not r.committed for r in resets),
        "f_fall": float(problem(start) - problem(run.x)),
        "bytes_per_step": bytes_per_step(planned.compressor, job.d),
        "seconds": time.perf_counter() - begin,
    }


def plan_for_unit_fall(a: Assumptions, planned: Plan) -> Plan:
    """Return the plan for f_max = 1, which corresponds to passing several saddles of this kind in sequence."""
    whole = Assumptions(
        a.d, a.epsilon, a.smoothness, a.hessian_lipschitz, a.sigma, lipschitz_gradient=a.lipschitz_gradient
    )
    return plan(whole, planned.compressor, constants=planned.constants)


def bytes_per_step(compressor: Compressor, d: int) -> int:
    """Return the bytes that one of four workers sends in a step, at single precision."""
    return choose(compressor, "direct", d=d, dense=0, workers=4).aggregator.wire(d, 0, 1, 4, 4).sent
