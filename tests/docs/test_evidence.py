"""Every number of evidence.md and of the README's measurements follows from committed rows, or is a setting.

A claim is a part of a page with its numbers, made from the rows. Pages must have all claims, and numbers outside of
them must be settings.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pytest
from stored_rows import Row, at_best_rate, dense_steps, raced, read, seconds_of, share_of_computing

from lab.bench.result import shown
from lab.race.gpt import STEPS
from lab.race.tables import CLOCKED, ROWS, SIZES, STEP_TIME, gaps, reached, searched, slope, unreached, untuned
from lab.race.train import rows as rows_of

ROOT = Path(__file__).parents[2]
RACE = ROOT / "experiments" / "race"
TARGET = RACE / "target"
SIGN, TOPK, SPARSE = "Sign(per_tensor=True)", 'TopK(1/16, values="int2")', 'TopK(1/48, values="int2")'
LINKS = ("10 Mbit/s", "50 Mbit/s", "200 Mbit/s", "1000 Mbit/s")
PEERS = ("local SGD", "DiLoCo", "PowerSGD", "DDP")  # methods of the races by the clock that are not ours
TARGETS = {"Muon": "1.6", "AdamW": "1.9"}  # losses of the races by the clock, by the optimizer inside
RATES = ("10", "50", "200", "1000")
# Numbers that are no measurements: periods, rates of links and of learning, sizes, names, and counts of runs.
SETTINGS = (
    r"Corollary 3\.3",
    r"0\.8 million|Every 32",
    r"every \d+(?:, \d+)* and (?:every )?\d+(?: steps)?|every \d+|period \(8 and 32\)",
    r"(?:\d[\d,]*(?:, | and ))*\d[\d,]* Mbit/s|\| 50 \| (?:200 \| )?1,000 \|",
    r"600(?:- and 1,200-step)? (?:steps|runs)|600 and 1,200 steps|1,200[ -]steps?|600-",
    r"0\.83 million|0\.36 million|1,000 steps",
    r"10\.7 million|0\.7 million|22\.6 million|ResNet-18|CIFAR-10|TopK 10%|float(?:16|32)",
    r"best of 0\.001, 0\.002 and 0\.004, which is 0\.002 for all|outer rate 0\.7|from step 100|momentum 0\.5",
    r"0\.001 and 0\.002|0\.002 for all|\(0\.001;|at 0\.0005|Only 0\.002|seed 0|rank (?:of )?4|at rate 1\)|16 bits",
    r"loss (?:is|of) 1\.[69]|1,000 scheduled|after 540 steps|2 logical cores|rate of 256",
    r"Below 200|512 steps|256 held-out windows|Algorithm 1|Figure 2|60 cases|15 methods|RandomK 1%",
    r"\(95% or more counts as 100%",
)


def page(name: str) -> str:
    """The prose and tables of a page in one line: without code blocks, links' targets, pictures and bold type."""
    text = re.sub(r"^ {4,}[^\n]*$", "", (ROOT / name).read_text(), flags=re.MULTILINE)
    text = re.sub(r"```.*?```|!\[.*?\]\(.*?\)|<picture>.*?</picture>", "", text, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text).replace("**", "").replace("[", "").replace("]", "")
    return re.sub(r"\s+", " ", text)


def check(text: str, claims: list[str]) -> None:
    """Every claim is in the text, and no number is outside of claims, settings and code."""
    for claim in claims:
        assert claim in text, claim
    for claim in sorted(claims, key=len, reverse=True):
        text = text.replace(claim, " ")
    text = re.sub(r"`[^`]*`", " ", text)
    for setting in SETTINGS:
        text = re.sub(setting, " ", text)
    assert re.findall(r".{0,40}\d[\d.,%]*.{0,20}", text) == []


def losses() -> Iterator[str]:
    """Losses and bytes at equal steps."""
    muon, adamw = trained("gpt-w2", "Muon, dense")[0], trained("gpt-w2", "AdamW, dense, beta1 0.8")
    one, two_bits = (trained("gpt-w2", f"Muon, local 8, {c}")[0] - muon for c in ("Sign", "TopK 1/2 int2"))
    default = "AdamW, local 8, Sign, mean momentum 0.5"
    base = "AdamW, dense, beta1 0.8"
    alone, more = (trained(f"gpt-w{n}", default)[0] - trained(f"gpt-w{n}", base)[0] for n in (2, 4))
    yield f"by {one:.3f} with one bit, and by {two_bits:.3f} with two bits"
    yield f"the loss is higher than dense training's by {alone:.3f} with two workers, and by {more:.3f} with four"
    topk, low_rank = raced("TopK(0.1) hook=bucket"), raced("powersgd-4")
    assert low_rank[1] < topk[1] / 2
    yield f"The loss after 600 steps is {topk[0]:.3f}"
    yield f"PowerSGD of rank 4 reaches {low_rank[0]:.3f} with less than half of the bytes"
    hook, dense = raced("QSGD(127) hook=bucket"), raced("ddp")
    assert hook[0] / dense[0] < 1.01
    assert round(dense[1] / hook[1]) in (6, 7)
    yield "within 1% of dense training's at a sixth of the bytes"
    for method in ("Muon, local 8, Sign", default):
        assert round(adamw[1] / trained("gpt-w2", method)[1]) == 203
    yield "1/203 of the bytes of DDP, start and end not counted"

    # Local updates compared with local SGD and DiLoCo.
    theirs, ours = raced("local-sgd-8"), raced(f"{SIGN} every=8")
    assert round(theirs[1] / ours[1]) == 25
    assert abs(theirs[0] - ours[0]) < 0.012
    yield "within 0.012, at 25 times the bytes"
    for setting in ("gpt-w2", "gpt-w4", "char-w4"):
        theirs, ours = (
            trained(setting, f"Muon, {m}") for m in ("DiLoCo 32, 0.5", "local 32, TopK 1/2 int2, outer 0.7 0.5")
        )
        assert theirs[0] < ours[0]
        assert 13 <= round(theirs[1] / ours[1]) <= 14
    yield "DiLoCo with a momentum of 0.5 has a lower loss"
    yield "at 13 to 14 times the bytes"
    ours, dense = (raced(m)[2] for m in (f"{TOPK} every=8", "ddp"))
    yield f"a process needs {round(ours - dense, -1):.0f} MB more"


def clock() -> Iterator[str]:
    """Seconds from start to target on links, by the clock: ratios to the best other method, and to computing alone."""
    for words, inner, workers in (
        ("Muon and AdamW, two", "Muon", 2),
        ("Muon and AdamW, four", "Muon", 4),
        ("AdamW alone, two", "AdamW", 2),
    ):
        yield f"| {words} | {' | '.join(ratio(*best_at(inner, rate, workers)[:2]) for rate in RATES)} |"
    over = {
        key: sorted(fmean(ours) / limit for ours, _, limit in (best_at(*key[:1], rate, key[1]) for rate in RATES))
        for key in (("Muon", 2), ("AdamW", 2))
    }
    yield "with AdamW alone takes {:.2f} to {:.2f} times as long".format(*(over["AdamW", 2][i] for i in (0, -1)))
    yield "training takes {:.2f} to {:.2f} times as long as dense".format(*(over["Muon", 2][i] for i in (0, -1)))
    (ours, peer, _), (more_ours, more_peer, _) = best_at("Muon", "1000"), best_at("Muon", "1000", 4)
    assert max(ours) > min(peer)  # the ranges overlap
    assert min(more_ours) < max(more_peer)
    assert round(fmean(more_ours) / fmean(more_peer), 2) == round(fmean(ours) / fmean(peer), 2)
    yield f"local updates take {fmean(ours) / fmean(peer):.2f} times as long as local SGD in 16 bits"
    for rate in RATES[2:]:  # every 2 steps is best there
        runs = [run for run in trainings("AdamW") if (run["method"], run["rate"]) == ("AdamW, local 2, Sign", rate)]
        mine = [seconds_of(run) for run in runs]
        assert fmean(mine) == pytest.approx(fmean(best_at("AdamW", rate)[0]))


def clock_card() -> Iterator[str]:
    """The card's rows, and what it predicts from steps and step times."""
    for inner, workers in (("Muon", 2), ("AdamW", 2), ("Muon", 4)):
        yield from clock_table(inner, workers)
    mean = {m: steps_of("AdamW", m) for m in ("local 8, Sign", "local 8, Sign, overlap 2")}
    yield f"and costs {mean['local 8, Sign, overlap 2'] / mean['local 8, Sign']:.2f} times the steps"
    method = "Muon, local 8, Sign of all tensors, overlap 2"
    steps = [float(run["steps"]) for run in {run["seed"]: run for run in of("Muon", method)}.values()]
    (*_, step) = (row for row in read(TARGET / "steps.csv") if (row["rate"], row["method"]) == ("10", method))
    ms, low, high = (float(step[name]) / 1000 for name in ("ms", "low", "high"))
    yield f"Predicted for ours at 10 Mbit/s, as steps times the median step, timed in turns: {fmean(steps) * ms:.0f} s "
    yield f"({min(steps) * low:.0f} to {max(steps) * high:.0f})"
    mine = [run for run in of("Muon", method) if run["rate"] == "10"]
    yield f"plus {fmean(float(run['start_s']) + float(run['flush_s']) for run in mine):.0f} s for start and flush"
    ours, peer, _ = best_at("Muon", "200", 4)
    yield f"two bits every 4 steps take {fmean(ours) / fmean(peer):.2f} times as long as averages in 16 bits"
    yield from overlaps()


def overlaps() -> Iterator[str]:
    """Ours, and averages in 16 bits that overlap with the next steps."""
    runs = read(TARGET / "overlap.csv")
    seconds = {(r["workers"], r["method"]): seconds_of(r) for r in runs}
    steps = [float(r["steps"]) for r in runs if (r["workers"], "SGD" in r["method"]) == ("2", True)]
    peer, more_peer = (min(s for (w, m), s in seconds.items() if w == n and "SGD" in m) for n in "24")
    ours, more_ours = (next(s for (w, m), s in seconds.items() if w == n and "SGD" not in m) for n in "24")
    yield "every 32, 64 or 128 steps that run behind the next 24 steps"
    yield f"need {min(steps):.0f} to {max(steps):.0f} steps, and at 10 Mbit/s {peer:.1f} s or more"
    yield f"where ours takes {ours:.1f} s; with four workers they need {more_peer:.1f} s or more, ours {more_ours:.1f}"


def clock_table(inner: str, workers: int = 2) -> Iterator[str]:
    """The rows of the table of a race, without the names of the methods."""
    runs = [run for run in trainings(inner) if run["rate"] in RATES and run["workers"] == str(workers)]
    rates = [rate for rate in RATES if any(run["rate"] == rate for run in runs)]
    assert all(run["reached"] == "True" for run in runs)
    for method in {run["method"] for run in runs}:
        mine = [run for run in runs if run["method"] == method]
        cells = [_range([seconds_of(run) for run in mine if run["rate"] == rate]) for rate in rates]
        by_seed = {run["seed"]: run for run in mine}.values()  # links change neither steps nor bytes
        steps, sent = (fmean(float(run[name]) for run in by_seed) for name in ("steps", "with_ends_mb"))
        yield f" | {steps:.0f} | {' | '.join(cells)} | {sent:,.1f} |".replace("  ", " ")  # as `page` does

    best = [best_at(inner, rate, workers) for rate in rates]
    yield f"| ours / the best peer's | | {' | '.join(ratio(ours, peer) for ours, peer, _ in best)} | |"
    over = " | ".join(f"{fmean(ours) / limit:.2f}" for ours, _, limit in best)
    yield f"| ours / computing dense training's steps | | {over} | |"


def ratio(ours: list[float], peer: list[float]) -> str:
    """The ratio of the means, and its range by seed."""
    each = [x / y for x, y in zip(ours, peer, strict=True)]
    return f"{fmean(ours) / fmean(peer):.2f} ({min(each):.2f} to {max(each):.2f})"


@cache
def best_at(inner: str, rate: str, workers: int = 2) -> tuple[list[float], list[float], float]:
    """The seconds by seed of our best method on a link, and of the best peer; and those of computing alone.

    The best has the least mean of those with three seeds.
    """
    found: dict[str, list[Row]] = {}
    for run in sorted(trainings(inner), key=lambda run: run["seed"]):
        if (run["rate"], run["workers"]) == (rate, str(workers)):
            found.setdefault(run["method"].removeprefix(f"{inner}, "), []).append(run)
    whole = {method: [*map(seconds_of, runs)] for method, runs in found.items() if len(runs) == 3}
    ours, peers = (
        min((m for m in whole if m.startswith(PEERS) == is_peer), key=lambda m: fmean(whole[m]))
        for is_peer in (False, True)
    )
    # A step alone was timed before and after each run; in the first runs it was only timed in turns with the others.
    timed = [row["ms"] for row in read(TARGET / "steps.csv") if is_alone(row, inner, workers)]
    alone = [float(ms) for ms in [run["alone_ms"] for run in found[ours] if run["alone_ms"]] or timed]
    limit = dense_steps(inner, workers, float(TARGETS[inner])) * fmean(alone) / 1000
    return whole[ours], whole[peers], limit


def is_alone(row: Row, inner: str, workers: int) -> bool:
    return (row["method"], row["workers"]) == (f"{inner.lower()}, alone", str(workers))


def steps_of(inner: str, method: str) -> float:
    """The mean over seeds of two workers' steps to the target."""
    return fmean({run["seed"]: float(run["steps"]) for run in of(inner, f"{inner}, {method}")}.values())


def of(inner: str, method: str) -> list[Row]:
    """The trainings of a method by two workers."""
    return [run for run in trainings(inner) if (run["workers"], run["method"]) == ("2", method)]


@cache
def trainings(inner: str) -> list[Row]:
    return [run for run in read(TARGET / "runs.csv") if run["target"] == TARGETS[inner]]


def trained(setting: str, method: str, *, seeds: int = 3) -> tuple[float, float]:
    """Mean validation loss of some seeds at the best rate, and kB a step, of a simulated method."""
    losses, sent = at_best_rate(read(ROOT / "experiments" / "muon" / f"{setting}.csv"), method)
    assert len(losses) == seeds
    return fmean(losses), sent


def _range(found: list[float]) -> str:
    """The mean, and with several seeds the range."""
    if not found:
        return ""
    return f"{fmean(found):.1f}" + (f" ({min(found):.1f} to {max(found):.1f})" if len(found) > 1 else ", one seed")


def nano_gpt() -> Iterator[str]:
    """nanoGPT's recipe: losses at its length, and the speed-up over one machine alone."""
    rows = untuned(rows_of(ROWS))

    def loss(workers: int, method: str, seeds: int = 3) -> float:
        key = str(workers), method, str(STEPS)
        found = [float(row["loss"]) for row in rows if (row["workers"], row["method"], row["steps"]) == key]
        assert len(found) == seeds
        return fmean(found)

    yield f"loss of {loss(2, 'local'):.3f}, dense training on the same examples at {loss(2, 'dense'):.3f}"
    yield f"and one machine alone at {loss(1, 'dense'):.3f}"
    hidden = speed_up(2, "local, overlap", 10)
    assert f"{hidden:.2f}" == f"{speed_up(2, 'local, overlap', 1000):.2f}"
    yield f"two workers with `overlap=2` need {hidden:.2f} times less time"
    two, four, eight, sixteen = (f"{speed_up(workers, 'local, agreement', 10):.2f}" for workers in (2, 4, 8, 16))
    yield f"two workers need {two} times less time, four {four} times, eight {eight} times, and sixteen {sixteen} times"
    peers = [
        one.speed_up(10) for one, _ in unreached(best()) if one.workers == 2 and one.method.startswith("local SGD")
    ]
    yield f"16 bits gains at most {max(peers):.2f} with two"
    ratio, difference = by_the_clock("2", "10")
    yield f"`overlap=2` needed {ratio:.2f} times less time at 10 Mbit/s"
    yield f"with a loss {difference:.3f} higher"
    yield f"Four workers needed {by_the_clock('4', '4')[0]:.2f} times less time at 4 Mbit/s"
    alone = fmean(clocked("4", "1", "seconds").values())
    yield f"compute {alone / STEPS / STEP_TIME:.1f} times as slowly"
    second = reached(searched(rows_of(ROWS.with_name("library.csv"))))
    text = [[one.speed_up(10) for one in second[key]] for key in ((2, "local, overlap"), (4, "local, agreement"))]
    assert [len(seeds) for seeds in text] == [3, 3]
    yield f"two workers need {fmean(text[0]):.2f} times less time, and four {fmean(text[1]):.2f} times"
    four, eight = (at_equal_steps(workers, steps, seeds) for workers, steps, seeds in ((4, 750, 3), (8, 500, 3)))
    assert at_equal_steps(2, 1000, 3) <= 0
    yield f"two workers lose nothing, four lose {four:.3f}, and eight {eight:.3f}"


def at_equal_steps(workers: int, steps: int, seeds: int) -> float:
    """Return the loss with agreement minus that of dense training in as many steps, each at its best rate."""
    losses = []
    for method in ("local, agreement", "dense"):
        key = method, str(workers), str(steps)
        found = [float(row["loss"]) for row in best() if (row["method"], row["workers"], row["steps"]) == key]
        assert len(found) == seeds
        losses.append(fmean(found))
    return losses[0] - losses[1]


def by_size() -> Iterator[str]:
    """The gap to dense training, by size of the network."""
    found = gaps(rows_of(SIZES), "local, agreement")
    sizes = [f"{size.parameters / 1e6:.1g}" for size in found]
    yield f"networks of {sizes[0]} to {sizes[-1]} million parameters"
    *means, last = (f"{fmean(size.gaps):.3f}" for size in found)
    yield f"minus that of dense training is {', '.join(means)} and {last}"
    growth, half = slope(found)
    yield f"changes the gap by {growth:.2f} ({growth - half:.2f} to {growth + half:.2f})"


def speed_up(workers: int, method: str, mbit: float) -> float:
    """Return the time of one machine over that of workers, to its loss and each at its best rate; a mean of 3 seeds."""
    seeds = reached(best())[workers, method]
    assert len(seeds) == 3
    return fmean(one.speed_up(mbit) for one in seeds)


@cache
def best() -> Sequence[Mapping[str, str]]:
    """Return the rows of nanoGPT's recipe at the best of the rates."""
    return searched(rows_of(ROWS))


def clocked(hosts: str, workers: str, column: str) -> Mapping[str, float]:
    """Return a column of the runs by the clock, "seconds" or "loss", by seed: the mean if a seed was run repeatedly."""
    rows = [row for row in rows_of(CLOCKED) if (row["hosts"], row["workers"]) == (hosts, workers)]
    return {s: fmean(float(row[column]) for row in rows if row["seed"] == s) for s in {row["seed"] for row in rows}}


def by_the_clock(workers: str, mbit: str) -> tuple[float, float]:
    """Return the time of one machine over that of several workers, and the workers' loss minus that of one machine.

    They are means over seeds.
    """
    assert {row["mbit"] for row in rows_of(CLOCKED) if row["hosts"] == workers} == {mbit}
    times, losses = ([clocked(workers, n, column) for n in (workers, "1")] for column in ("seconds", "loss"))
    assert all(of_seeds.keys() == {"0", "1", "2"} for of_seeds in (*times, *losses))
    higher = [losses[0][seed] - losses[1][seed] for seed in losses[0]]
    assert max(higher) < 0.006  # the times are to nearly the same loss
    return fmean(times[1][seed] / times[0][seed] for seed in times[0]), fmean(higher)


def other_tasks() -> Iterator[str]:
    """The pretrained transformer."""
    rows, dense = read(ROOT / "experiments" / "fine-tuning" / "minilm.csv"), read(RACE / "finetune.csv")
    ours, theirs = (
        [row for row in rows if row["method"] == method and row["rate"] == "0.0003"]
        for method in ("one bit 2, agreement 1, no mm", "dense")
    )
    assert len(ours) == len(theirs) == 3
    lost = fmean(float(row["loss"]) for row in ours) - fmean(float(row["loss"]) for row in theirs)
    (whole,) = {float(row["sent"]) / 1000 for row in dense if row["contender"] == "ddp"}
    yield f"loses {lost:.3f} to DDP, at a {whole / float(ours[0]['kB_a_step']):.0f}st of the bytes (three seeds)"


def shares() -> Iterator[str]:
    """Fractions of the time in which workers compute."""

    two = [row for row in read(RACE / "steps.csv") if row["workers"] == "2"]
    large = read(RACE / "steps-10m.csv")

    def share(rows: Sequence[Row], method: str, mbit: float) -> str:
        found = share_of_computing(rows, method, mbit)
        return "100%" if found >= 0.955 else f"{100 * found:.0f}%"

    few = share(two, "Identity every=128", 10), share(two, f"{SPARSE} every=8", 10)
    yield f"10 Mbit/s: dense {share(two, 'ddp', 10)}, uncompressed every 128 steps {few[0]},"
    yield f"`{SPARSE}` every 8 steps {few[1]}."
    yield f"1,000 Mbit/s: dense {share(two, 'ddp', 1000)}."
    (alone,) = [float(row["ms"]) for row in large if row["contender"] == "alone"]
    cells = [share(large, m, 50) for m in ("ddp", f"{TOPK} every=8", f"{SPARSE} every=32")]
    yield f"({alone:.0f} ms of computing a step): dense {cells[0]}, `{TOPK}` every 8 steps {cells[1]}, "
    yield f"`{SPARSE}` every 32 steps {cells[2]}."


def plan() -> Iterator[str]:
    """Errors of predicted steps, and regrets, which are in the race's page."""
    text = (RACE / "README.md").read_text()
    errors: dict[str, list[int]] = {}
    for link, predicted, measured, error in re.findall(
        r"^\| (\d+ Mbit/s) \| .* \| ([\d.]+) \| ([\d.]+) \| ([-+]\d+)% \|$", text, re.MULTILINE
    ):
        assert abs(100 * (float(predicted) / float(measured) - 1) - int(error)) < 0.7
        errors.setdefault(link, []).append(int(error))
    a, b, c, d = (f"{median(map(abs, errors[link])):.0f}" for link in LINKS)
    all_errors = [error for mine in errors.values() for error in mine]
    assert len(all_errors) == 60
    low, *_, high = sorted((a, b, c, d), key=int)
    yield f"is {low} to {high}%, depending on the link"
    yield f"the largest errors are {min(all_errors)} and +{max(all_errors)}%"
    regrets = re.findall(r"^\| \d+ Mbit/s \| .* \| \d+ \| .* \| \d+ \| ([\d.]+) \|$", text, re.M)
    assert len(regrets) == 8
    yield f"at most {max(regrets)} times as long to reach the target loss"


def saddles() -> Iterator[str]:
    """Theorem 3.2's runs, and Figure 2."""
    with (ROOT / "experiments" / "theorem" / "saddles.csv").open(newline="") as file:
        mine = [row for row in csv.DictReader(file) if row["variant"] == "Algorithm 1"]
    low = min(float(row["smallest_share"]) for row in mine)
    high = max(float(row["largest_share"]) for row in mine)
    yield f"{100 * low:.1f} to {100 * high:.1f}% of the iterates"
    found = summary("figure2")
    sooner = [
        fmean(found[f"{name}, no noise"]["plateau_epochs"]["values"])
        - fmean(found[f"{name}, noise 0.01"]["plateau_epochs"]["values"])
        for name in ("uncompressed", "TopK 0.1%", "RandomK 0.1%")
    ]
    yield f"plateau {min(sooner):.1f} to {max(sooner):.1f} epochs sooner"
    quiet, noisy = (summary("figure2-open")[f"uncompressed, linear output, {n}"] for n in ("no noise", "noise 0.01"))
    gain = quiet["plateau_epochs"]["mean"] - noisy["plateau_epochs"]["mean"]
    ends = f"from {quiet['final_loss']['mean']:.4f} to {noisy['final_loss']['mean']:.4f}"
    yield f"plateau {gain:.1f} epochs sooner, and raises the final loss {ends}"


def summary(name: str) -> dict[str, Any]:
    """The settings of a study, by name."""
    document = json.loads((ROOT / "experiments" / name / "summary.json").read_text())
    return {setting["setting"]: setting for setting in document["settings"]}


def test_evidence() -> None:
    claims = [*losses(), *nano_gpt(), *by_size(), *clock(), *other_tasks(), *plan(), *saddles()]
    assert len(claims) > 25
    check(page("docs/evidence.md"), claims)


def test_cards() -> None:
    """The tables that evidence.md sums up, in the cards of the race."""
    for name, claims in (
        ("experiments/race/times.md", clock_card()),
        ("experiments/race/README.md", shares()),
    ):
        text = page(name)
        assert [claim for claim in claims if claim not in text] == []


def link(name: str) -> dict[str, Any]:
    """A stored table of step times on a link, whose numbers are lab/bench/link.md's."""
    (table,) = json.loads((RACE / "link" / f"{name}.json").read_text())
    return dict(table)


def link_tables() -> Iterator[str]:
    """The lines of the tables of lab/bench/link.md, and its comparison of times to a loss."""
    for name in ("resnet18-100", "mnist-10", "mnist-100", "mnist-1000"):
        for row in link(name)["rows"]:
            milliseconds = f"{shown(row['ms'])} ({shown(row['low'])} to {shown(row['high'])})"
            quotients = f"{row['/ floor']:.2f} | {shown(row['dense / it'])} | {shown(row['allowed'])}"
            sent = f"{shown(row['kB'])} | {shown(row['counted kB'])}"
            yield f"| {row['contender']} | {milliseconds} | {shown(row['floor ms'])} | {quotients} | {sent} |"
    seeds = json.loads((RACE / "link" / "mnist-10-loss.json").read_text())
    taken = dict[str, float]()
    for rows in zip(*(seed["rows"] for seed in seeds), strict=True):
        name, seconds = rows[0]["contender"], [row["s to target"] for row in rows]
        taken[name] = fmean(seconds)
        yield f"| {name} | {_range(seconds)} | {fmean(row['steps'] for row in rows):,.0f} |"
    best = [min(s for name, s in taken.items() if name.startswith(kind)) for kind in ("TopK", "local-sgd")]
    yield f"TopK 1% takes {best[0] / best[1]:.2f} times as long as torch's local SGD"


def test_link_page() -> None:
    text = page("lab/bench/link.md")
    for line in link_tables():
        assert line in text, line
    of = {row["contender"]: row for row in link("mnist-1000")["rows"]}
    top, random = (of[f"{name}(0.01)"] for name in ("TopK", "RandomK"))
    fewer = f"a {of['ddp']['kB'] / top['kB']:.0f}th of DDP's bytes"
    faster = [f"{100 * (row['dense / it'] - 1):.0f}% faster" for row in (top, random)]
    guide = page("docs/slow-links.md")
    assert f"TopK 1% sends {fewer}, but trains only {faster[0]} than DDP" in guide
    assert f"RandomK 1% needs less coding and trains {faster[1]}" in guide


def front() -> Iterator[str]:
    """The README's measurements."""
    names = "Muon, local 8, Sign", "Muon, dense"
    assert at_equal_steps(2, 1000, 3) <= 0
    four, eight = at_equal_steps(4, 750, 3), at_equal_steps(8, 500, 3)
    yield f"with two workers, {four:.3f} more with four, and {eight:.3f} with eight"
    yield "DDP sends over 230 times the bytes"
    lengths = (("2", "1000"), ("4", "750"), ("8", "500"))
    sent = {(row["method"], row["workers"], row["steps"]): float(row["sent"]) for row in best()}
    assert all(sent["dense", *key] > 230 * sent["local, agreement", *key] for key in lengths)
    (loss, sent), (muon, whole) = (trained("gpt-w2", name) for name in names)
    yield f"send a {whole / sent:.0f}rd of DDP's bytes (without start and end)"
    yield f"their loss is {loss - muon:.2f} above DDP's"
    ours, peer, _ = best_at("Muon", "10")
    yield f"`LocalUpdates` reach a loss of 1.6 in {fmean(ours):.0f} s, and local SGD needs {fmean(peer):.0f} s"
    ours, peer, _ = best_at("Muon", "1000")
    assert fmean(ours) == pytest.approx(fmean(peer), rel=0.015)  # the times are equal

    yield f"reach the loss of one machine {by_the_clock('2', '10')[0]:.2f} times as soon"
    yield f"DDP would take {1 / speed_up(2, 'dense', 10):.0f} times as long as one machine"

    # The bytes of Figure 2.
    found = summary("figure2")
    whole = found["uncompressed, noise 0.01"]["megabytes"]["mean"]
    few = sorted(100 * found[f"{n} 0.1%, noise 0.01"]["megabytes"]["mean"] / whole for n in ("TopK", "RandomK"))
    yield f"also at {few[1]:.1f}% of the bytes"
    for name in ("uncompressed", "TopK 0.1%", "RandomK 0.1%"):
        stay = [found[f"{name}, {n}"]["plateau_epochs"]["mean"] for n in ("no noise", "noise 0.01")]
        assert 2 < stay[0] / stay[1] < 3.2  # noise at least halves it


def test_front_page() -> None:
    text = page("README.md")
    caption = text.partition("nanoGPT's small")[2].partition("## ")[0]
    check(caption + text.partition("## What is measured")[2].partition("Other methods beat")[0], list(front()))
