"""packsaddle plan."""

import inspect
import json as json_format
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Literal

from rich.table import Table

from packsaddle.cli.console import print_table
from packsaddle.cli.parsing import Seconds
from packsaddle.cli.plan_link import LinkOptions, plan_link
from packsaddle.compressors import (
    QSGD,
    AdaptiveTopK,
    Compressor,
    Identity,
    LinearSketch,
    LowRank,
    RandomK,
    SharedTopK,
    Sign,
    SketchTopK,
    TopK,
)
from packsaddle.compressors.registry import compressors, parse_compressor
from packsaddle.errors import ConfigError
from packsaddle.options.schema import nearest
from packsaddle.plan.link import MEASURED, Optimizer
from packsaddle.runs.progress import megabytes
from packsaddle.theory.bounds import PRACTICAL, Assumptions, Constants, first_order_plan
from packsaddle.theory.plans import FAMILIES, MOST_STEPS, Plan, Reach, balanced_k, best_plan, reach
from packsaddle.theory.plans import plan as plan_with
from packsaddle.theory.table1 import TABLE_1, Order, check_range

_WITH_RATIO: Mapping[str, Callable[[float], Compressor]] = {
    "randomk": RandomK,
    "topk": TopK,
    "sketchtopk": SketchTopK,
    "sharedtopk": SharedTopK,
    "linearsketch": LinearSketch,
    "adaptivetopk": AdaptiveTopK,
}
_FIXED: Mapping[str, Compressor] = {"identity": Identity(), "sign": Sign(), "qsgd": QSGD(), "lowrank": LowRank()}
_BEST = {name.lower(): family for name, family in FAMILIES.items()}
_UNCUT = "--json prints it whole"
_PACE = 1000  # steps a second, of a fast machine and a small network
_SECONDS_PER_YEAR = 365.25 * 24 * 3600


def plan(
    d: int | None = None,
    epsilon: float | None = None,
    smoothness: float = 1.0,
    hessian_lipschitz: float = 1.0,
    sigma: float = 1.0,
    f_max: float = 1.0,
    lipschitz_gradient: float | None = None,
    compressor: str = "best",
    ratio: float | None = None,
    mode: Literal["practical", "theory"] = "practical",
    workers: int | None = None,
    table: bool = False,
    link: str | None = None,
    model: str | None = None,
    latency: Seconds | None = None,
    compute: Seconds | None = None,
    batch: int | None = None,
    spread: float | None = None,
    noise: bool = False,
    optimizer: Optimizer | None = None,
    up: str | None = None,
    down: str | None = None,
    local: bool = False,
    most_steps: float | None = None,
    json: bool = False,
) -> None:
    """Plan a run: parameters for an epsilon-second-order stationary point, or (--link) the time of a step.

    With --epsilon: step size, steps, noise, escape check and bytes by the theorems, or that this is OUT OF REACH, with
    what would have to change. With --link: which compressor
    makes the shortest step on that link, or that none beats dense training.

    Examples:
        packsaddle plan --d 1000000 --epsilon 0.2 --lipschitz-gradient 1
        packsaddle plan --d 1000000 --epsilon 0.2 --table
        packsaddle plan --link 100mbit --model char-transformer --workers 2 --local
        packsaddle plan --link 100mbit --model resnet18 --optimizer sgd
        packsaddle plan --up 20mbit --down 100mbit --model char-transformer --local
        torchrun --nnodes 2 --nproc-per-node 1 -m packsaddle.cli plan --link auto --model resnet18

    Args:
        d: Coordinates of the parameter vector, as 25000000, 25e6 or 25M.
        epsilon: Target: gradient norm at most epsilon, smallest eigenvalue at least -sqrt(rho epsilon).
        smoothness: L, the Lipschitz constant of the gradient.
        hessian_lipschitz: rho, the Lipschitz constant of the Hessian.
        sigma: Standard deviation of the stochastic gradient, as a norm.
        f_max: How far f can fall.
        lipschitz_gradient: The Lipschitz constant of every stochastic gradient (Assumption C), if there is one.
        compressor: "best" (RandomK, TopK, SketchTopK, SharedTopK and LinearSketch, each at its best k), or one of
            these, AdaptiveTopK, Sign, QSGD, LowRank and Identity, in any case; or a call: 'TopK(0.01, values="int8")'.
        ratio: Share of the coordinates that are sent, as 0.01 or 1%, for one compressor by name; without it the best
            (with --link, 0.01).
        mode: "theory" has the constants and logarithms of a proof, "practical" some that can be run.
        workers: Workers, 4 by default; under torchrun its own.
        table: Print Table 1 of the paper for this d and epsilon instead.
        link: Rate of each worker's link, as in 100mbit, 1gbit or 12.5MB/s; or "auto" to measure it: between torchrun's
            workers, else between processes on this machine.
        model: What is trained, instead of --d: mnist-autoencoder, char-transformer (117,221 parameters, over
            Python's own reference), or resnet18, resnet34 or resnet50 (for 32 x 32 images).
        latency: Time that a small message takes on a link of a given rate, 100us by default.
        compute: Time of a step's forward and backward pass, as in 55ms; without it the model's is measured here.
        batch: Examples per worker and step, to measure that, 32 by default.
        spread: Standard deviation of the workers' compute times, as a share of them; 0 by default.
        noise: Count the drawing of the artificial noise in a step's time.
        optimizer: Behind the DDP hook: multiply times by the steps that each compressor was measured to need with it.
            Without --ratio, the compressors that were measured are compared.
        up: With --down instead of --link: the rate at which each worker can send, where that differs. Every exchange
            receives as much as it sends, so the slower direction counts.
        down: The rate at which each worker can receive.
        local: Plan local updates too (their period, compressor, fragments and overlap), and choose. What was measured
            of them is with adamw, which is then the optimizer.
        most_steps: Leave out local updates that need more than this multiple of dense training's steps.
        json: Print one JSON document.
    """
    options = LinkOptions(d, model, latency, compute, batch, spread, noise or None, up, down, local or None, most_steps)
    theory = _changed(
        smoothness=smoothness,
        hessian_lipschitz=hessian_lipschitz,
        sigma=sigma,
        f_max=f_max,
        lipschitz_gradient=lipschitz_gradient,
        mode=mode,
    )
    if local and optimizer == "sgd":
        raise ConfigError("--local is with adamw, with which local updates were measured: leave out --optimizer sgd")
    if most_steps is not None and not local:
        raise ConfigError("--most-steps is for local updates: it needs --local")
    if link is not None or up is not None or down is not None:
        given = {"epsilon": epsilon, "table": table or None} | theory
        _refuse(given, "is for a plan by the theorems, not for the time of a step: leave out --link, or it")
        optimizer = "adamw" if local else optimizer
        plan_link(_rate(options, link), options, _candidates(compressor, ratio, optimizer), workers, optimizer, json)
        return
    given = {n: value for n, value in asdict(options).items() if n != "d"} | {"optimizer": optimizer}
    _refuse(given, "is for the time of a step: it needs --link")
    if d is None or epsilon is None:
        missing = " and ".join(f"--{n}" for n, value in (("d", d), ("epsilon", epsilon)) if value is None)
        raise ConfigError(f"plan needs {missing}; or --link RATE, for the time of a step")
    if table:
        given = theory | _changed(compressor=compressor, workers=workers, ratio=ratio)
        _refuse(given, "is for a plan, and --table has the paper's settings: leave out one")
    workers = 4 if workers is None else workers
    try:
        if table:
            _table_1(d, epsilon, json)
            return
        a = Assumptions(d, epsilon, smoothness, hessian_lipschitz, sigma, f_max, lipschitz_gradient)
        constants = Constants.theory(a) if mode == "theory" else PRACTICAL
        plans = [plan_with(a, Identity(), constants=constants, workers=workers)]
        plans += _asked_for(a, constants, workers, compressor, ratio)
        reached = reach(a, constants)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if json:
        shown = [{**p.plain(), "balanced_k": _balanced_k(p)} for p in plans]
        document = {"assumptions": asdict(a), "constants": asdict(constants), "workers": workers, "plans": shown}
        print(_dump({**document, "out_of_reach": reached.out_of_reach, "reach": asdict(reached)}))
    else:
        _show(plans)
        if reached.out_of_reach:
            print(_out_of_reach(reached, a))


def _rate(options: LinkOptions, link: str | None) -> str:
    try:
        return options.rate(link)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _asked_for(a: Assumptions, constants: Constants, workers: int, name: str, ratio: float | None) -> list[Plan]:
    """Return the plans other than the uncompressed one."""
    if "(" in name:
        return [plan_with(a, _written(name, ratio), constants=constants, workers=workers)]
    name = name.lower()
    _check_name(name)
    if ratio is not None and name not in _WITH_RATIO:
        raise ConfigError(f"ratio is for one of {', '.join(_WITH_RATIO)}, got compressor {name!r}")
    if ratio is not None:
        return [plan_with(a, _WITH_RATIO[name](ratio), constants=constants, workers=workers)]
    if name in _BEST or name == "best":
        families = _BEST.values() if name == "best" else [_BEST[name]]
        return [best_plan(a, family, constants=constants, workers=workers) for family in families]
    if name == "identity":
        return []
    if name not in _FIXED:
        raise ConfigError(f"compressor {name!r} needs --ratio")
    return [plan_with(a, _FIXED[name], constants=constants, workers=workers)]


def _written(text: str, ratio: float | None) -> Compressor:
    """The compressor of a call such as TopK(0.01)."""
    if ratio is not None:
        raise ConfigError(f"ratio is for a compressor by name, got compressor {text!r}")
    try:
        return parse_compressor(text)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check_name(name: str) -> None:
    names = ["best", *_WITH_RATIO, *_FIXED]
    if name not in names:
        raise ConfigError(f"compressor must be one of {', '.join(names)}, got {name!r}{nearest(name, names)}")


def _changed(**given: Any) -> dict[str, Any]:
    """Return the flags of `plan` that are not at their defaults, the others as None."""
    flags = inspect.signature(plan).parameters
    return {name: None if value == flags[name].default else value for name, value in given.items()}


def _refuse(given: Mapping[str, Any], why: str) -> None:
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"--{name.replace('_', '-')} {why}")


def _candidates(name: str, ratio: float | None, optimizer: Optimizer | None) -> list[Compressor]:
    """The compressors to compare on a link: all ("best"), or one; identity is what dense training sends anyway."""
    if "(" in name:
        return [_written(name, ratio)]
    name = name.lower()
    _check_name(name)
    if optimizer is not None and name == "best" and ratio is None:
        return list(MEASURED[optimizer])
    if ratio is not None and name in _FIXED:
        raise ConfigError(f"ratio is for one of best, {', '.join(_WITH_RATIO)}, got compressor {name!r}")
    ratio = 0.01 if ratio is None else ratio
    try:
        if name == "best":
            return [c for c in compressors(ratio) if not c.lossless]
        return [_WITH_RATIO[name](ratio)] if name in _WITH_RATIO else [_FIXED[name]]
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _balanced_k(p: Plan) -> int | None:
    """Corollary 3.3's k for the plan's kind of compressor."""
    family = FAMILIES.get(type(p.compressor).__name__)
    return balanced_k(p.assumptions, family, constants=p.constants) if family else None


def _show(plans: list[Plan]) -> None:
    first, a = plans[0], plans[0].assumptions
    table = Table("~ order of magnitude", *(type(p.compressor).__name__ + "*" * _outside(p) for p in plans))
    for column in table.columns[1:]:
        column.justify = "right"
    for label, cell in _ROWS.items():
        table.add_row(label, *map(cell, plans))
    print_table(table, _UNCUT)
    setting = "Assumption C holds" if a.lipschitz_gradient is not None else "Assumption C is not assumed (alpha = d)"
    print(f"d = {a.d:,}, epsilon = {a.epsilon:g}, {setting}, {first.workers} workers.")
    print(
        f"~ noise r = {first.noise:.3g} per coordinate, of norm r sqrt(d) = {first.noise_norm:.3g}: it must be about "
        f"sigma = {a.sigma:g} or more, and {'is' if first.noise_suffices else 'IS NOT'}."
    )
    print(f"~ escape radius R = {first.radius:.3g}; an escape lowers f by F = {first.decrease:.3g}.")
    if any(map(_outside, plans)):
        print("* The mean of the workers' compressed messages is outside the proofs; they compress the mean.")
    print(_how_far_to_trust(plans))


def _out_of_reach(reached: Reach, a: Assumptions) -> str:
    """Return the verdict on a plan that is out of reach, and what would have to change."""
    days = MOST_STEPS / _PACE / 86400
    lines = [
        f"OUT OF REACH: the fewest steps here are {reached.steps:.1e}, and a plan of more than {MOST_STEPS:.0e} "
        f"({days:.0f} days at {_PACE:,} a second) is none.",
    ]
    if reached.at_twice_epsilon is not None:
        times = reached.steps / reached.at_twice_epsilon
        power = math.log2(times)
        lines += [f"  Steps grow as about epsilon^-{power:.1f} here: twice the epsilon takes 1/{times:.3g} of them."]
    if reached.epsilon is None:
        lines += ["  No epsilon that these L and rho allow brings it within reach."]
    else:
        lines += [f"  Within reach from about --epsilon {_rounded_up(reached.epsilon):g} on."]
    if reached.with_lipschitz_gradient is not None:
        lines += [
            f"  If every stochastic gradient is Lipschitz (Assumption C: --lipschitz-gradient, here {a.smoothness:g}), "
            f"{reached.with_lipschitz_gradient:.1e} steps.",
        ]
    lines += ["  The theory is cautious: on small problems steps 16 to 256 times as long did as well (docs/plans.md)."]
    return "\n".join(lines)


def _rounded_up(value: float) -> float:
    """To two significant digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(value / unit) * unit


def _outside(p: Plan) -> bool:
    return not p.proved_for_workers


def _first_order(p: Plan) -> tuple[float, int]:
    found = first_order_plan(p.assumptions, p.mu)
    return found.eta, found.steps


_ROWS: Mapping[str, Callable[[Plan], str]] = {
    "theorem": lambda p: p.theorem,
    "k": lambda p: "" if p.k is None else f"{p.k:,}",
    "k of Corollary 3.3": lambda p: "" if _balanced_k(p) is None else f"{_balanced_k(p):,}",
    "mu": lambda p: f"{p.mu:.3g}",
    "~ step size eta": lambda p: f"{p.eta:.2e}",
    "bound by": lambda p: p.bound_by,
    "~ steps T": lambda p: f"{p.steps:.2e}",
    "~ interval I": lambda p: f"{p.interval:.2e}",
    "sent per step": lambda p: megabytes(p.sent),
    "~ sent in all, MB": lambda p: f"{p.total / 1e6:.2e}",
    "~ uncompressed / this": lambda p: f"{p.improvement:,.3g}",
    "first-order alone: eta": lambda p: f"{_first_order(p)[0]:.2e}",
    "first-order alone: steps": lambda p: f"{_first_order(p)[1]:.2e}",
}


def _how_far_to_trust(plans: list[Plan]) -> str:
    c = plans[0].constants
    lines = ["~ Order of magnitude: the theorems hide their constants."]
    if c.mode == "theory":
        years = min(p.steps for p in plans) / 1e6 / _SECONDS_PER_YEAR
        verdict = "Out of reach: at" if years > 1 else "At"
        lines += [
            f"  Here stand Jin et al.'s (2021) for uncompressed SGD, with iota = {c.iota:.3g} for their logarithm.",
            f"  {verdict} a million steps a second, the fewest here take {years:.1e} years.",
            "  The proofs' constants are far from tight; --mode practical has some that can be run.",
        ]
    else:
        lines += [
            "  Here stand the proved first-order bounds, and saddles of curvature -sqrt(rho epsilon) left one after",
            "  another in twice the predicted median time. No guarantee goes with it: take it as a start for tuning.",
        ]
    lines += [
        "  Exact: mu (SketchTopK's is stated as k/d), k, and bytes per step (but for coded indices).",
        "  Proved: first-order alone, under Assumptions A and B, without noise and resets.",
    ]
    return "\n".join(lines)


def _table_1(d: int, epsilon: float, json: bool) -> None:
    check_range(d, epsilon)
    if json:
        print(_dump({"d": d, "epsilon": epsilon, "table": [row.plain(d, epsilon) for row in TABLE_1]}))
        return
    table = Table("gradient", "compressor", "mu", "iterations", "communication", "improvement", "printed")
    for row in TABLE_1:
        cells = [_formula(order, d, epsilon) for order in (row.iterations, row.communication, row.improvement)]
        mu = "c > 0" if row.mu is None else _formula(row.mu, d, epsilon)
        printed = "-" if row.printed is None else "the same" if row.follows else _formula(row.printed, d, epsilon)
        setting = "Lipschitz" if row.lipschitz else "not Lipschitz"
        mark = "" if row.possible(d, epsilon) else " !"
        table.add_row(setting, row.compressor + mark, mu, *cells, printed, end_section=row.compressor == "constant")
    table.caption = f"d = {d:,}, eps = {epsilon:g}; orders of magnitude with every constant 1; communication in numbers"
    print_table(table, _UNCUT)
    print("improvement is what the communication column gives (row one's divided by this one's); printed, the paper's.")
    if any(not row.possible(d, epsilon) for row in TABLE_1):
        print("! mu is not in [1/d, 1] for this d and eps, so there is no such compressor.")


def _formula(order: Order, d: int, epsilon: float) -> str:
    return f"{order}\n= {order(d, epsilon):.2e}"


def _dump(document: dict[str, Any]) -> str:
    return json_format.dumps(document, indent=2)
