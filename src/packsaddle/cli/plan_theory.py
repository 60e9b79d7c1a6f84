"""The commands `packsaddle plan theory` and `packsaddle plan table`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from json import dumps
from typing import Literal

from rich.table import Table

from packsaddle.cli.compressor_names import FIXED, WITH_RATIO, called, check_name
from packsaddle.cli.console import number_table, print_table
from packsaddle.cli.flags import grouped
from packsaddle.compressors import Identity
from packsaddle.errors import ConfigError, config_errors
from packsaddle.runs.progress import megabytes
from packsaddle.theory.bounds import PRACTICAL, Assumptions, Constants, first_order_plan
from packsaddle.theory.plans import FAMILIES, MOST_STEPS, Plan, Reach, balanced_k, best_plan, plan, reach
from packsaddle.theory.table1 import TABLE_1, Order, check_range

_BEST = {name.lower(): family for name, family in FAMILIES.items()}
_UNCUT = "--json prints it whole"
_PACE = 1000  # steps per second of a small network on a fast machine
_SECONDS_PER_YEAR = 365.25 * 24 * 3600


@grouped(
    {
        "": "d epsilon lipschitz_gradient json",
        "problem": "smoothness hessian_lipschitz sigma f_max",
        "algorithm": "compressor ratio workers mode",
    }
)
def theory(
    assumptions: Assumptions,
    compressor: str = "best",
    ratio: float | None = None,
    mode: Literal["practical", "theory"] = "practical",
    workers: int = 4,
    json: bool = False,
) -> None:
    """Compute the parameters of Algorithm 1 from the theorems.

    Prints the step size, number of steps, noise, escape check and bytes that reach an epsilon-second-order stationary
    point; or that the target is OUT OF REACH, with the changes that would bring it within reach.

    Examples:
        packsaddle plan theory --d 1000000 --epsilon 0.2 --lipschitz-gradient 1
        packsaddle plan theory --d 25M --epsilon 0.2 --compressor topk --ratio 1%
        packsaddle plan theory --d 1000000 --epsilon 0.2 --json

    Args:
        compressor: "best" (RandomK, TopK, SketchTopK, SharedTopK and LinearSketch, each at its best k), or one of
            these, AdaptiveTopK, Sign, QSGD, LowRank and Identity, in any case; or a call: 'TopK(0.01, values="int8")'.
        ratio: Fraction of the coordinates to send, as 0.01 or 1%, for one compressor by name; by default the best
            one.
        mode: "theory" uses the constants and logarithms of a proof, "practical" constants that give feasible runs.
        workers: Number of workers, at least 2.
        json: Print one JSON document.
    """
    # The first plan is uncompressed: the others are compared with it.
    with config_errors():
        constants = Constants.theory(assumptions) if mode == "theory" else PRACTICAL
        plans = [plan(assumptions, Identity(), constants=constants, workers=workers)]
        plans += _asked_for(assumptions, constants, workers, compressor, ratio)
        reached = reach(assumptions, constants)

    # Print JSON or the table.
    if json:
        document = {
            "assumptions": asdict(assumptions),
            "constants": asdict(constants),
            "workers": workers,
            "plans": [{**p.plain(), "balanced_k": _balanced_k(p)} for p in plans],
            "out_of_reach": reached.out_of_reach,
            "reach": asdict(reached),
        }
        print(dumps(document, indent=2))
        return
    _show(plans)
    if reached.out_of_reach:
        print(_out_of_reach(reached, assumptions))


def _asked_for(a: Assumptions, constants: Constants, workers: int, name: str, ratio: float | None) -> list[Plan]:
    """Return the plans of `name` and `ratio`, without the uncompressed one."""
    if "(" in name:
        return [plan(a, called(name, ratio), constants=constants, workers=workers)]
    name = name.lower()
    check_name(name)

    # With a ratio this compressor; without one the best k of its family, or a compressor without a ratio.
    if ratio is not None and name not in WITH_RATIO:
        raise ConfigError(f"ratio is for one of {', '.join(WITH_RATIO)}, got compressor {name!r}")
    if ratio is not None:
        return [plan(a, WITH_RATIO[name](ratio), constants=constants, workers=workers)]
    if name in _BEST or name == "best":
        families = _BEST.values() if name == "best" else [_BEST[name]]
        return [best_plan(a, family, constants=constants, workers=workers) for family in families]
    if name == "identity":
        return []
    if name not in FIXED:
        raise ConfigError(f"compressor {name!r} needs --ratio")
    return [plan(a, FIXED[name], constants=constants, workers=workers)]


def _balanced_k(p: Plan) -> int | None:
    """Return k from Corollary 3.3 for the plan's kind of compressor; None if it has no k."""
    family = FAMILIES.get(type(p.compressor).__name__)
    return balanced_k(p.assumptions, family, constants=p.constants) if family else None


def _show(plans: list[Plan]) -> None:
    first, a = plans[0], plans[0].assumptions
    table = number_table("~ order of magnitude", *(type(p.compressor).__name__ + "*" * _outside(p) for p in plans))
    for label, cell in _ROWS.items():
        table.add_row(label, *map(cell, plans))
    print_table(table, _UNCUT)

    # r, R and F do not depend on the compressor.
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
    """Return the verdict on a plan that is out of reach, with the changes that would bring it within reach."""
    days = MOST_STEPS / _PACE / 86400
    lines = [
        f"OUT OF REACH: the fewest steps here are {reached.steps:.1e}, and a plan of more than {MOST_STEPS:.0e} "
        f"({days:.0f} days at {_PACE:,} a second) is none.",
    ]

    # Changes that help: a larger epsilon, or Assumption C.
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
    """Round up to two significant digits."""
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

    # The guarantee depends on the source of the constants.
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


def table(d: int, epsilon: float, json: bool = False) -> None:
    """Print the paper's Table 1 for a given d and epsilon.

    Each cell has the paper's formula for iterations or communication, and its value.

    Examples:
        packsaddle plan table --d 1000000 --epsilon 0.2
        packsaddle plan table --d 25M --epsilon 0.1 --json

    Args:
        d: Number of parameters, as 25000000, 25e6 or 25M.
        epsilon: Target: gradient norm at most epsilon, in (0, 1).
        json: Print one JSON document.
    """
    with config_errors("--"):
        check_range(d, epsilon)
    if json:
        print(dumps({"d": d, "epsilon": epsilon, "table": [row.plain(d, epsilon) for row in TABLE_1]}, indent=2))
        return

    # Each row has its numbers below its formulas.
    rows = Table("gradient", "compressor", "mu", "iterations", "communication", "improvement", "printed")
    for row in TABLE_1:
        cells = [_formula(order, d, epsilon) for order in (row.iterations, row.communication, row.improvement)]
        mu = "c > 0" if row.mu is None else _formula(row.mu, d, epsilon)
        printed = "-" if row.printed is None else "the same" if row.follows else _formula(row.printed, d, epsilon)
        setting = "Lipschitz" if row.lipschitz else "not Lipschitz"
        mark = "" if row.possible(d, epsilon) else " !"
        rows.add_row(setting, row.compressor + mark, mu, *cells, printed, end_section=row.compressor == "constant")
    rows.caption = f"d = {d:,}, eps = {epsilon:g}; orders of magnitude with every constant 1; communication in numbers"
    print_table(rows, _UNCUT)
    print("improvement is what the communication column gives (row one's divided by this one's); printed, the paper's.")
    if any(not row.possible(d, epsilon) for row in TABLE_1):
        print("! mu is not in [1/d, 1] for this d and eps, so there is no such compressor.")


def _formula(order: Order, d: int, epsilon: float) -> str:
    return f"{order}\n= {order(d, epsilon):.2e}"
