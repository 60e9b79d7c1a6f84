"""Tables of what `theorem` measured: shares of stationary iterates, steps, and their exponents."""

import math
from collections import defaultdict
from statistics import median
from typing import Any

import numpy as np

from packsaddle.experiments.reproduce.theorem import COMPRESSORS, SIGMA, WIDTH
from packsaddle.theory.bounds import Assumptions
from packsaddle.theory.plan import plan

Run = dict[str, Any]


def shares(runs: list[Run]) -> list[Run]:
    """The share of epsilon-SOSPs among x_0 ... x_T for the planned T, a row per setting."""
    groups = defaultdict(list)
    for run in runs:
        if run["question"] == "share":
            groups[run["constants"], run["problem"], run["epsilon"], run["d"], run["compressor"]].append(run)
    rows = []
    for (constants, problem, epsilon, d, compressor), group in sorted(groups.items()):
        rows.append(
            {
                "constants": constants,
                "problem": problem,
                "epsilon": epsilon,
                "d": d,
                "compressor": compressor,
                "theorem": group[0]["theorem"],
                "T": group[0]["planned_steps"],
                "seeds": len(group),
                "smallest_share": min(run["share"] for run in group),
                "first_half_at": max((run["half"] or math.inf) for run in group),
                "rolled_back": sum(run["rolled_back"] for run in group),
            }
        )
    return rows


def steps(runs: list[Run]) -> list[Run]:
    """Steps until half of the iterates are epsilon-SOSPs, with the planned step size and with the best one tried."""
    groups: dict[Any, dict[float, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run["question"] == "half":
            key = (run["lipschitz"], run["epsilon"], run["d"], run["compressor"])
            groups[key][run["factor"]].append(run)
    rows = []
    for (lipschitz, epsilon, d, compressor), by_factor in sorted(groups.items()):
        medians = {f: median(run["half"] or math.inf for run in group) for f, group in by_factor.items()}
        every = {f: m for f, m in medians.items() if all(run["half"] for run in by_factor[f])}
        best = min(every, key=lambda f: every[f])
        planned = by_factor[1.0][0]
        fall = 2 * (WIDTH * math.sqrt(epsilon)) ** 3  # of f from one saddle; a fall of 1 takes 1 / fall of them
        rows.append(
            {
                "lipschitz": lipschitz,
                "epsilon": epsilon,
                "d": d,
                "compressor": compressor,
                "seeds": len(by_factor[1.0]),
                "eta": planned["eta"],
                "bound_by": planned["bound_by"],
                "planned": planned["planned_steps_f1"],
                "measured": medians[1.0] / fall,
                "best": every[best] / fall,
                "best_factor": best,
                "bytes_per_step": planned["bytes_per_step"],
                "planned_bytes": medians[1.0] / fall * planned["bytes_per_step"],
                "best_bytes": every[best] / fall * planned["bytes_per_step"],
            }
        )
    return rows


def exponents(rows: list[Run]) -> list[Run]:
    """Slopes in log-log of steps and bytes, against epsilon and against d; `limit` is what T's tends to."""
    out = []
    for compressor in COMPRESSORS:
        for lipschitz in (True, False):
            mine = [row for row in rows if row["compressor"] == compressor and row["lipschitz"] == lipschitz]
            for variable in ("epsilon", "d"):
                points = sweep(mine, variable)
                if len(points) > 2:
                    fits = {
                        name: fit(points, variable, name)
                        for name in ("planned", "measured", "best", "planned_bytes", "best_bytes")
                    }
                    out.append(
                        {"compressor": compressor, "lipschitz": lipschitz, "against": variable}
                        | {"limit": limit(compressor, lipschitz, variable)}
                        | {name: round(slope, 2) for name, slope in fits.items()}
                    )
    return out


def limit(compressor: str, lipschitz: bool, variable: str) -> float:
    """The exponent of the planned T where epsilon is small, or d large, at the mu that was measured."""

    def steps_at(epsilon: float, d: int) -> float:
        known = Assumptions(d, epsilon, sigma=SIGMA, lipschitz_gradient=1.0 if lipschitz else None)
        return plan(known, COMPRESSORS[compressor]).steps

    if variable == "epsilon":
        ends = [(math.log(e), math.log(steps_at(e, 16))) for e in (1e-9, 1e-8)]
    else:
        ends = [(math.log(d), math.log(steps_at(0.2, d))) for d in (10**10, 10**9)]
    (x, y), (u, v) = ends
    return round((v - y) / (u - x), 2)


def sweep(rows: list[Run], variable: str) -> list[Run]:
    """The rows in which only this variable changes."""
    other = "d" if variable == "epsilon" else "epsilon"
    counts: dict[Any, list[Run]] = defaultdict(list)
    for row in rows:
        counts[row[other]].append(row)
    most: list[Run] = max(counts.values(), key=len) if counts else []
    return sorted(most, key=lambda row: row[variable])


def fit(rows: list[Run], variable: str, quantity: str) -> float:
    return float(np.polyfit(np.log([r[variable] for r in rows]), np.log([r[quantity] for r in rows]), 1)[0])
