"""The predictions of `packsaddle plan link` for a race's steps, and the regret of its choice.

    python -m lab.race.regret experiments/race [--workers 2]

Prints, for each number of workers and link of a race (`python -m lab.race loss`), the predicted and measured
milliseconds of the steps that the planner supports. It also prints the regret: the measured time to the target of the
method that the planner chooses, over that of the best method that it could have chosen. The planner gets the computing
time of `alone`, measured on the same link, and speeds of packing and unpacking that are measured now, so run this on
the machine of the race. The planner does not model workers that share cores; therefore its coding times are multiplied
by the number of workers per core.
"""

import argparse
import math
import os
from dataclasses import astuple
from functools import cache, partial
from pathlib import Path

from lab.race.contenders import ALONE, DENSE, Contender, parse
from lab.race.curves import load
from lab.race.time_to_loss import Rates, StepOnLink, load_steps, rows
from lab.race.workload import TrainingWorkload
from packsaddle.plan import (
    LATENCY,
    Fleet,
    Line,
    Link,
    ModelSize,
    Pace,
    Setting,
    forecast,
    forecast_local,
    measure,
    measured_with,
    update_seconds,
)
from packsaddle.plan import MEASURED as HOOK


@cache
def pace(compressor: object, d: int, workers: int) -> Pace:
    """Return a compressor's speed of packing and unpacking, measured once and reduced if workers share cores."""
    alone, share = measure(compressor, d, repeats=5), max(1.0, workers / (os.cpu_count() or 1))  # type: ignore[arg-type]
    lines = {name: [share * value for value in astuple(line)] for name, line in vars(alone).items()}
    return Pace(**{name: Line(*values) for name, values in lines.items()})


def setting(contender: Contender) -> Setting | None:
    """Return a contender's local updates as the planner's setting, or None if the planner does not support it."""
    if contender.every is None or contender.compressor is None or contender.outer != "none" or contender.delay:
        return None
    kept = not contender.compressor.lossless
    return Setting(contender.every, contender.compressor, keep_unsent=kept)


def foreseen(texts: list[str], workload: ModelSize, link: Link, fleet: Fleet, update: float) -> dict[str, float]:
    """Return the predicted seconds per step of each contender that the planner supports."""
    found: dict[str, float] = {}
    shared = partial(pace, workers=fleet.workers)
    for text in texts:
        contender = parse(text, 1.0)
        if text == DENSE or contender.hook:
            compressors = {} if contender.compressor is None else {contender.compressor: 1.0}
            verdict = forecast(workload, link, fleet, compressors, shared)
            found[text] = next(f for f in verdict.forecasts if f.is_dense != bool(compressors)).time.total
        elif (mine := setting(contender)) is not None:
            (one,) = forecast_local(workload, link, fleet, {mine: 1.0}, shared, update=update)
            found[text] = one.step
    return found


def factor(text: str, workers: int) -> float | None:
    """Return the number of steps that a contender needs, as the planner's multiple of dense training's steps.

    The multiple is that of the nearest measured period; None if no measured period is within 10% of the contender's.
    """
    contender = parse(text, 1.0)
    if text == DENSE:
        return 1.0
    if contender.hook:
        return None if contender.compressor is None else HOOK["adamw"].get(contender.compressor)
    mine = setting(contender)
    if mine is None:
        return None
    near = {s: steps for s, steps in measured_with(workers).items() if s.compressor == mine.compressor and not s.delay}
    closest = min(near, key=lambda s: abs(math.log(s.every / mine.every)), default=None)
    return None if closest is None or abs(math.log(closest.every / mine.every)) > math.log(1.1) else near[closest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    steps = [step for step in load_steps(args.folder / "steps.csv") if step.workers == args.workers]
    curves = [curve for curve in load(args.folder / "curves.csv") if curve.workers == args.workers]
    table, workload = (
        rows(curves, steps),
        ModelSize.of_model("gpt", TrainingWorkload("gpt", 8).task()),
    )
    update = update_seconds(workload.d)
    print("| link | contender | predicted ms | measured ms | error |\n| --- | --- | --- | --- | --- |")
    regrets = []
    for link in dict.fromkeys(step.link for step in steps):
        here = {step.contender: step for step in steps if step.link == link}
        regrets.append(_one_link(link, here, args.workers, workload, update, table))
    print("\n| link | choice | its time s | best | its time s | regret |\n| --- | --- | --- | --- | --- | --- |")
    print("\n".join(regrets))


def _one_link(
    link: Rates,
    here: dict[str, StepOnLink],
    workers: int,
    workload: ModelSize,
    update: float,
    table: list[dict[str, object]],
) -> str:
    """Print the predicted and measured step times on one link, and return the link's row in the table of regrets."""
    fleet = Fleet(workers, here[ALONE].ms / 1000)
    nominal = Link.nominal(1e6 * min(link.up, link.down), LATENCY)
    predicted = foreseen(list(here), workload, nominal, fleet, update)
    for text, seconds in predicted.items():
        measured = here[text].ms
        print(f"| {link} | {text} | {1000 * seconds:.1f} | {measured:.1f} | {1000 * seconds / measured - 1:+.0%} |")
    times: dict[str, float] = {}
    for row in table:
        text, seconds_there = str(row["method"]), row[str(link)]
        if text in predicted and isinstance(seconds_there, float):
            times[text] = min(times.get(text, math.inf), seconds_there)
    scores = {text: predicted[text] * f for text in times if (f := factor(text, workers)) is not None}
    choice, best = min(scores, key=scores.__getitem__), min(times, key=times.__getitem__)
    return (
        f"| {link} | {choice} | {times[choice]:.0f} | {best} | {times[best]:.0f} | {times[choice] / times[best]:.2f} |"
    )


if __name__ == "__main__":
    main()
