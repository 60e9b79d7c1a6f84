"""The commands of the paper's theory: `packsaddle plan theory` prints the parameters of Algorithm 1 that the paper's
theorems give, and `packsaddle plan table` prints Table 1 of the paper."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from json import dumps
from typing import Literal

from rich.table import Table

from packsaddle.cli.compressor_names import FIXED, WITH_RATIO, names_compressors, read_compressor
from packsaddle.cli.console import digits, number_table, print_table
from packsaddle.cli.flags import grouped
from packsaddle.compressors import Compressor, Identity
from packsaddle.errors import ConfigError, config_errors
from packsaddle.theory.bounds import PRACTICAL, Assumptions, Constants, first_order_plan
from packsaddle.theory.plans import FAMILIES, MOST_STEPS, Plan, Reach, balanced_k, best_plan, plan, reach
from packsaddle.theory.table1 import TABLE_1, Order, check_range

_BEST = {name.lower(): family for name, family in FAMILIES.items()}
_UNCUT = "--json prints it whole"
_PACE = 1000  # steps per second of a small network on a fast machine
_SECONDS_PER_YEAR = 365.25 * 24 * 3600


@names_compressors
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

    Prints the step size, number of steps, noise, escape check and bytes with which training reaches an
    epsilon-second-order stationary point. If this needs too many steps, also prints OUT OF REACH, and the changes that
    would reduce the number of steps.

    Examples:
        packsaddle plan theory --d 1000000 --epsilon 0.2 --lipschitz-gradient 1
        packsaddle plan theory --d 25M --epsilon 0.2 --compressor topk --ratio 1%
        packsaddle plan theory --d 1000000 --epsilon 0.2 --json

    Args:
        compressor: "best" (each compressor that sends a given number k of values, at its best k), or one of
            COMPRESSORS, in any case; or a call: 'TopK(0.01, values="int8")'.
        ratio: Fraction of the coordinates to send, such as 0.01 or 1%, for a single compressor; by default the best
            fraction.
        mode: "theory" uses the constants and logarithms of a proof; "practical" uses constants that give feasible runs.
        workers: Number of workers, at least 2.
        json: Print one JSON document.
    """
    # Compute the plans. The first plan is without compression, and all other plans are compared with it.
    with config_errors():
        constants = Constants.theory(assumptions) if mode == "theory" else PRACTICAL
        plans = [plan(assumptions, Identity(), constants=constants, workers=workers)]
        plans += _asked_for(assumptions, constants, workers, compressor, ratio)
        reached = reach(assumptions, constants)

    # Print the plans as JSON or as tables.
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
        _print_reach(reached, assumptions)


def _asked_for(a: Assumptions, constants: Constants, workers: int, text: str, ratio: float | None) -> list[Plan]:
    """Return a plan, i.e. the parameters of Algorithm 1, for each compressor that the command line requests by `text`
    and `ratio`. The list is empty for "identity", whose plan the caller has already."""
    name = read_compressor(text, ratio)
    if isinstance(name, Compressor):
        return [plan(a, name, constants=constants, workers=workers)]
    # Use the compressor with the given ratio. If no ratio is given, use the best number k of coordinates to send.
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
    family = FAMILIES.get(type(p.compressor).__name__)
    return balanced_k(p.assumptions, family, constants=p.constants) if family else None


def _show(plans: list[Plan]) -> None:
    for columns in _TABLES:
        table = number_table("compressor", *columns)
        for p in plans:
            name = type(p.compressor).__name__ + "*" * (not p.proved_for_workers)
            table.add_row(name, *(cell(p) for cell in columns.values()))
        print_table(table, _UNCUT)

    # Print the noise, the escape radius and the decrease of f by an escape, which do not depend on the compressor.
    first, a = plans[0], plans[0].assumptions
    setting = "Assumption C holds" if a.lipschitz_gradient is not None else "Assumption C is not assumed (alpha = d)"
    print(f"d = {a.d:,}, epsilon = {a.epsilon:g}, {setting}, {first.workers} workers.")
    print("eta: step size. I: steps between escape checks. Improvement: uncompressed bytes in all over this plan's.")
    print(
        f"~ noise r = {first.noise:.3g} per coordinate, norm r sqrt(d) = {first.noise_norm:.3g}, which must be at "
        f"least about sigma = {a.sigma:g}, and {'is' if first.noise_suffices else 'IS NOT'}."
    )
    print(f"~ escape radius R = {first.radius:.3g}; an escape decreases f by F = {first.decrease:.3g}.")
    if not all(p.proved_for_workers for p in plans):
        print("* Not covered by the proofs, which compress the mean over workers: here each worker compresses.")

    # Print how reliable the numbers are, which depends on the source of the constants.
    c = first.constants
    print("~ Order of magnitude: the theorems hide their constants.")
    if c.mode == "theory":
        years = min(p.steps for p in plans) / 1e6 / _SECONDS_PER_YEAR
        verdict = "Out of reach: at" if years > 1 else "At"
        print(f"  Used here: those of Jin et al. (2021) for uncompressed SGD; their logarithm is iota = {c.iota:.3g}.")
        print(f"  {verdict} a million steps a second, the shortest plan takes {years:.1e} years.")
        print("  The proofs' constants are far from tight; --mode practical has constants that give feasible runs.")
    else:
        print(
            "  Used here: the proved first-order bounds, and twice the predicted median time to escape each saddle of"
        )
        print("  curvature -sqrt(rho epsilon), sequentially. This is no guarantee: use the plan as a start for tuning.")
    print("  Exact: mu (SketchTopK's is stated as k/d), k, and bytes per step (except coded indices).")
    print("  Proved: first-order alone, under Assumptions A and B, without noise and resets.")


def _print_reach(reached: Reach, a: Assumptions) -> None:
    """Print that the target epsilon needs more steps than the limit, and the changes that would reduce their number."""
    days = MOST_STEPS / _PACE / 86400
    print(
        f"OUT OF REACH: the uncompressed plan needs {reached.steps:.1e} steps, over the limit of {MOST_STEPS:.0e} "
        f"({days:.0f} days at {_PACE:,} steps a second)."
    )

    # Suggest changes: a larger epsilon, or Assumption C.
    if reached.at_twice_epsilon is not None:
        times = reached.steps / reached.at_twice_epsilon
        power = math.log2(times)
        print(f"  Steps grow about as epsilon^-{power:.1f} here: twice the epsilon needs 1/{times:.3g} of the steps.")
    if reached.epsilon is None:
        print("  No epsilon that is valid for this L and rho is within reach.")
    else:
        unit = 10.0 ** (math.floor(math.log10(reached.epsilon)) - 1)
        # Round the smallest epsilon within reach up to two significant digits.
        rounded_up = math.ceil(reached.epsilon / unit) * unit
        print(f"  Within reach: about --epsilon {rounded_up:g} and larger.")
    if reached.with_lipschitz_gradient is not None:
        print(
            f"  With Lipschitz stochastic gradients (Assumption C, --lipschitz-gradient {a.smoothness:g}): "
            f"{reached.with_lipschitz_gradient:.1e} steps."
        )
    print(
        "  The theory is cautious: on small problems 16 to 256 times larger step sizes worked as well (docs/plans.md)."
    )


# The tables of `packsaddle plan theory`. Each maps a column's heading to a function that formats a plan's cell.
_TABLES: Sequence[Mapping[str, Callable[[Plan], str]]] = (
    {
        "theorem": lambda p: p.theorem,
        "mu": lambda p: f"{p.mu:.3g}",
        "~ eta": lambda p: f"{p.eta:.2e}",
        "bound by": lambda p: p.bound_by,
        "~ steps T": lambda p: f"{p.steps:.2e}",
        "~ I": lambda p: f"{p.interval:.2e}",
    },
    {
        "k": lambda p: "" if p.k is None else f"{p.k:,}",
        "k of Corollary 3.3": lambda p: "" if _balanced_k(p) is None else f"{_balanced_k(p):,}",
        "sent kB a step": lambda p: digits(p.sent / 1e3),
        "~ sent MB in all": lambda p: f"{p.total / 1e6:.2e}",
        "~ improvement": lambda p: f"{p.improvement:,.3g}",
    },
    {
        "first-order alone: eta": lambda p: f"{first_order_plan(p.assumptions, p.mu).eta:.2e}",
        "first-order alone: steps": lambda p: f"{first_order_plan(p.assumptions, p.mu).steps:.2e}",
    },
)


def table(d: int, epsilon: float, json: bool = False) -> None:
    """Print the paper's Table 1 for a given d and epsilon.

    Each cell has the paper's formula for iterations or communication, and its value.

    Examples:
        packsaddle plan table --d 1000000 --epsilon 0.2
        packsaddle plan table --d 25M --epsilon 0.1 --json

    Args:
        d: Number of parameters of the model, such as 25M, 25e6 or 25000000.
        epsilon: Target: gradient norm at most epsilon, at least 1e-20 and below 1.
        json: Print one JSON document.
    """
    with config_errors("--"):
        check_range(d, epsilon)
    if json:
        print(dumps({"d": d, "epsilon": epsilon, "table": [row.plain(d, epsilon) for row in TABLE_1]}, indent=2))
        return

    # Print a table for the case with Assumption C, and a table for the case without it. Each cell has a formula and its
    # value.
    for setting, lipschitz in (
        ("Lipschitz stochastic gradients (Assumption C)", True),
        ("Without Assumption C", False),
    ):
        rows = Table("compressor", "mu", "iterations", "communication", "improvement")
        for row in (row for row in TABLE_1 if row.lipschitz == lipschitz):
            cells = [_formula(order, d, epsilon) for order in (row.iterations, row.communication, row.improvement)]
            mu = "c > 0" if row.mu is None else _formula(row.mu, d, epsilon)
            rows.add_row(row.compressor, mu + " !" * (not row.possible(d, epsilon)), *cells)
        print(f"{setting}:\n")
        print_table(rows, _UNCUT)

    # Print the meaning of the numbers in the tables.
    print(
        f"d = {d:,}, eps = {epsilon:g}. Orders of magnitude, with every constant 1. Communication: numbers per worker."
    )
    print("Improvement: the communication of the first row over that of this row. [19], [25]: the paper's references.")
    for row in TABLE_1:
        if row.printed is not None and not row.follows:
            setting = f"{row.compressor}, {'with' if row.lipschitz else 'without'} Assumption C"
            print(f"The paper prints another improvement for {setting}: {row.printed} = {row.printed(d, epsilon):.2e}.")
    if any(not row.possible(d, epsilon) for row in TABLE_1):
        print("! mu is outside [1/d, 1] for this d and eps, so no such compressor exists.")


def _formula(order: Order, d: int, epsilon: float) -> str:
    return f"{order}\n= {order(d, epsilon):.2e}"
