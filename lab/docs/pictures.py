"""The pictures of ideas in docs/pictures, each as NAME-light.svg and NAME-dark.svg, in which text remains text.

make pictures, or: python -m lab.docs.pictures [--out FOLDER]

A picture is 560 units wide, with text of at least 18, which is 11 pixels on a phone. Positions are in these units, from
the upper left corner. Vectors, certificates and bytes are computed by the package, or read from an experiment's rows.
"""

import argparse
import csv
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import packsaddle
from lab.docs.canvas import THEMES, Canvas, svg
from lab.docs.measured import losses, sizes, speed_ups, times, workers

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "pictures"
D = 200  # number of coordinates of the test problem with a saddle


def local_updates(canvas: Canvas) -> None:
    """Draw a round of local updates in three rows.

    They show the steps of two workers, the division of each worker's change into message and residual, and the
    exchange.
    """
    theme = canvas.theme

    # Compute the vectors.
    colors = theme.first, theme.second
    paths = [walk(torch.tensor(minimum), seed) for seed, minimum in enumerate(([3.0, 0.9], [0.8, -2.2]))]
    changes = [path[-1] for path in paths]
    messages = [packsaddle.Sign()(change) for change in changes]
    mean_message = torch.stack(messages).mean(0)

    # Write the texts. `place` maps a vector in the plane to its position in a row.
    rows = (
        ("1  H steps alone", "Each worker steps from the anchor with its own optimizer and its own data."),
        (
            "2  Compress",
            "Its change is a message of a bit a coordinate, which it sends, and a residual, which it keeps.",
        ),
        (
            "3  Exchange",
            "The mean message moves the anchor. A worker resumes there, plus its residual: no change is lost.",
        ),
    )
    for i, (title, words) in enumerate(rows):
        canvas.text(268, 220 * i + 26, title, weight="bold", fontsize=20)
        canvas.text(268, 220 * i + 60, words, wrap=27)
        canvas.box(0, 220 * i, 248, 204, lw=0)

    def place(row: int, v: Tensor) -> tuple[float, float]:
        return 86 + 58 * float(v[0]), 220 * row + 100 - 48 * float(v[1])

    for row in range(3):
        x, y = place(row, torch.zeros(2))
        canvas.dot(x, y, theme.ink, 8)
        canvas.text(x - 14, y, "anchor", weight="bold", ha="right")

    # Row 1: draw every step of both workers.
    for path, color in zip(paths, colors, strict=True):
        canvas.axes.plot(*zip(*(place(0, point) for point in path), strict=True), color=color, lw=2, marker="o", ms=5)
    canvas.text(104, 34, "worker 1", theme.first)
    canvas.text(136, 184, "worker 2", theme.second)

    # Row 2: draw each worker's change as the sum of message and residual.
    for change, message, color in zip(changes, messages, colors, strict=True):
        canvas.arrow(place(1, torch.zeros(2)), place(1, message), color, lw=4, mutation_scale=22)
        canvas.arrow(place(1, message), place(1, change), theme.kept, lw=3)
        canvas.dot(*place(1, change), color)
    canvas.text(42, 220 + 36, "message", theme.first)
    canvas.text(160, 220 + 94, "residual", theme.kept)

    # Row 3: draw the new anchor, and the points from which the workers continue.
    canvas.arrow(place(2, torch.zeros(2)), place(2, mean_message), theme.ink, lw=4, mutation_scale=22, shrinkB=7)
    for change, message, color in zip(changes, messages, colors, strict=True):
        start = place(2, mean_message + change - message)
        canvas.arrow(place(2, mean_message), start, theme.kept, lw=3)
        canvas.dot(*start, color)
    canvas.dot(*place(2, mean_message), theme.ink, 8)
    canvas.text(170, 440 + 68, "new anchor", weight="bold", ha="center")


def walk(minimum: Tensor, seed: int, steps: int = 8) -> Tensor:
    """Return the points of an SGD run from 0 toward a minimum in the plane, float[steps + 1, 2]."""
    rng = torch.Generator().manual_seed(seed)
    points = [torch.zeros(2)]
    for _ in range(steps):
        points.append(points[-1] + 0.2 * (minimum - points[-1]) + 0.14 * torch.randn(2, generator=rng))
    return torch.stack(points)


def algorithm(canvas: Canvas) -> None:
    """Draw Algorithm 1 from top to bottom. Numbers are the paper's line numbers, as in examples/reference.py."""
    theme = canvas.theme

    def line(number: int, x: float, y: float, words: str = "", **options: object) -> None:
        canvas.dot(x, y, theme.muted, 15)
        canvas.text(x, y + 1, str(number), theme.page, ha="center", weight="bold", zorder=5)
        canvas.text(x + 44, y, words, **options)

    # Draw the initialization, and the frame of the loop.
    canvas.box(96, 4, 448, 76)
    line(1, 66, 24, "memory e = 0 on every worker")
    line(2, 66, 58, "first segment: x' = x")
    canvas.arrow((360, 80), (360, 146))
    canvas.box(2, 96, 556, 552, facecolor="none", linestyle="--")
    line(3, 66, 122, "for t = 0, 1, ...", weight="bold")

    # Draw the escape check.
    canvas.box(96, 146, 448, 76)
    line(4, 66, 166, "y = x - eta mean(e)")
    line(5, 66, 200, "segment too long, or y too far from x'?")
    canvas.arrow((260, 222), (260, 260))
    canvas.text(272, 241, "yes")
    canvas.box(96, 260, 360, 76)
    line(6, 66, 280, "if the loss fell x = y, else x = x'")
    line(7, 66, 314, "new segment: x' = x, e = 0")
    canvas.arrow((260, 336), (260, 374))
    canvas.arrow((500, 222), (500, 374))
    canvas.text(512, 241, "no")

    # Draw each worker's message and residual.
    for shift in (12, 6, 0):
        canvas.box(96 + shift, 374 + shift, 436, 148, zorder=1)
    canvas.text(110, 396, "each worker", weight="bold")
    line(9, 66, 430, "v = e + gradient + noise")
    line(10, 66, 464, "g = C(v), the message")
    line(12, 66, 498, "e = v - g, the residual", color=theme.kept)
    canvas.axes.plot((348, 386, 386), (498, 498, 430), color=theme.kept, lw=2.5)
    canvas.arrow((386, 430), (356, 430), theme.kept, lw=2.5)
    canvas.text(400, 464, "next step", theme.kept)

    # Draw the exchange, the arrow back to the loop's start, and the result.
    canvas.arrow((260, 534), (260, 576), theme.first, lw=3)
    canvas.text(274, 556, "g of all workers", theme.first)
    canvas.box(96, 576, 448, 46, theme.first)
    line(11, 66, 599, "x = x - eta mean(g), on all workers")
    canvas.axes.plot((180, 180, 26, 26), (622, 635, 635, 122), color=theme.muted, lw=2)
    canvas.arrow((26, 122), (50, 122))
    canvas.arrow((260, 622), (260, 666))
    line(14, 66, 680, "x, the result after T steps")


def saddle(canvas: Canvas) -> None:
    """Draw the loss around a saddle and a minimum, and the interval that a certificate of each point proves.

    The interval contains the smallest eigenvalue of the Hessian at the point.
    """
    points = torch.zeros(2, D, dtype=torch.float64)
    points[1, 0] = 0.5**0.5  # where the derivative of x^4 / 4 - x^2 / 4 is 0
    certificates = [certificate(point) for point in points]
    landscape(canvas, float(points[1, 0]), certificates[0].escape_direction)
    intervals(canvas, certificates, exact=[float((eigenvalues() + 3 * point**2).min()) for point in points])


def landscape(canvas: Canvas, minimum: float, direction: Tensor) -> None:
    """Draw contours of the loss in the plane of the first and last coordinates, the saddle, a minimum and a direction.

    `direction` is the escape direction, float[D].
    """
    theme = canvas.theme

    def place(x: float, y: float) -> tuple[float, float]:
        return 280 + 250 * x, 160 - 150 * y

    # Draw the loss, and the points.
    x, y = torch.meshgrid(torch.linspace(-1.1, 1.1, 89), torch.linspace(-0.85, 0.85, 61), indexing="xy")
    f = loss(torch.stack((x, y), -1), eigenvalues()[[0, -1]])
    contours = [-0.06, -0.045, -0.03, -0.015, 0, 0.03, 0.08, 0.16, 0.28]
    canvas.axes.contour(*place(x, y), f, contours, colors=theme.level, linewidths=1.5, linestyles="solid")
    v = direction[[0, -1]] / direction[0]
    for side in (-1, 1):
        canvas.arrow(place(0, 0), place(*(0.45 * side * v).tolist()), theme.second, lw=3, shrinkA=8)
    canvas.dot(*place(0, 0), theme.second, 9)
    canvas.dot(*place(minimum, 0), theme.first, 9)

    # Write the names of the points.
    canvas.text(280, 16, "The loss around a saddle and a minimum", weight="bold", ha="center")
    halo = {"ha": "center", "bbox": {"facecolor": theme.page, "edgecolor": "none", "pad": 1}}
    canvas.text(280, 128, "saddle", theme.second, **halo)
    canvas.text(280 + 250 * minimum, 128, "minimum", theme.first, **halo)
    canvas.text(204, 190, "v: the loss falls", theme.second, **halo)


def intervals(canvas: Canvas, certificates: list[packsaddle.Certificate], exact: list[float]) -> None:
    """Draw the certified intervals of the smallest eigenvalue, on one axis with the threshold."""
    theme = canvas.theme

    def at(curvature: float) -> float:
        return 396 + 480 * curvature

    # Draw the regions of the two verdicts on both sides of the threshold.
    threshold, top = at(certificates[0].threshold), 326
    canvas.text(280, top, "The Hessian's smallest eigenvalue, certified", weight="bold", ha="center")
    canvas.box(4, top + 22, threshold - 6, 176, lw=0)
    canvas.box(threshold + 2, top + 22, 554 - threshold, 176, lw=0)
    canvas.text((4 + threshold) / 2, top + 42, "a saddle", theme.muted, ha="center")
    canvas.text((threshold + 558) / 2, top + 42, "second-order stationary", theme.muted, ha="center")

    # Draw the certified interval of each point, with the exact eigenvalue.
    rows = ((top + 104, 14, "saddle", theme.second), (top + 172, threshold + 12, "minimum", theme.first))
    for (y, left, name, color), found, value in zip(rows, certificates, exact, strict=True):
        low, high = found.lambda_min_lower, found.lambda_min_upper
        canvas.text(left, y - 28, f"{name}: {low:.2f} to {high:.2f}", color)
        canvas.axes.plot((max(at(low), 30), at(high)), (y, y), color=color, lw=10, solid_capstyle="butt")
        if at(low) < 30:  # the interval extends beyond the left edge
            canvas.arrow((40, y), (10, y), color, lw=10, mutation_scale=26)
        canvas.axes.plot(at(value), y, "D", color=theme.ink, ms=9, zorder=5)

    # Draw the threshold and the legend.
    canvas.axes.plot((threshold, threshold), (top + 22, top + 206), color=theme.ink, lw=2, linestyle="--")
    canvas.text(threshold, top + 222, f"threshold {certificates[0].threshold:.2f}", ha="center")
    canvas.axes.plot(440, top + 222, "D", color=theme.ink, ms=9)
    canvas.text(456, top + 222, "exact")


def eigenvalues() -> Tensor:
    """Return the eigenvalues of the Hessian at 0, float64[D]; only the first is negative."""
    values = torch.linspace(0.05, 1, D, dtype=torch.float64)
    values[0] = -0.5
    return values


def loss(x: Tensor, curvatures: Tensor) -> Tensor:
    """Return f(x) = sum_i lambda_i x_i^2 / 2 + x_i^4 / 4, float[...], of x, float[..., n], and lambda, float[n]."""
    return (curvatures * x**2 / 2 + x**4 / 4).sum(-1)


def certificate(point: Tensor) -> packsaddle.Certificate:
    """Return the certificate of a point, float64[D], for the function `loss`."""
    search = packsaddle.Search(generator=torch.Generator().manual_seed(0))
    return packsaddle.certify(
        torch.nn.ParameterList([point]),
        lambda model, batch: loss(model[0], eigenvalues()),
        [torch.zeros(1)],
        epsilon=0.04,
        hessian_lipschitz=1.0,
        search=search,
        progress=False,
    )


def wire(canvas: Canvas) -> None:
    """Draw the bytes that a worker sends after each of eight steps, by three methods, on one scale."""
    theme = canvas.theme

    # For each method: name, row in the table of the race, period of exchanges, text and color.
    sent = kilobytes()
    methods = (
        ("DistributedDataParallel", "ddp", 1, "every step, {:.0f} bits a parameter", theme.muted),
        ("register_ddp_hook", "QSGD(127) hook=bucket", 1, "every step, {:.0f} bits a parameter", theme.second),
        ("LocalUpdates", "Sign(per_tensor=True) every=8", 8, "every 8 steps, {:.0f} bit a parameter", theme.first),
    )
    parameters = 1e3 * sent["ddp"] / 4  # in DDP each of two workers sends 4 bytes per parameter and step

    # Draw bars for eight steps, and their mean.
    canvas.text(4, 14, "Bytes that a worker sends after each of 8 steps", weight="bold")
    for i, (name, row, every, words, color) in enumerate(methods):
        top, ground = 44 + 142 * i, 174 + 142 * i
        canvas.text(4, top + 10, name, color, weight="bold")
        canvas.text(4, top + 34, words.format(8e3 * every * sent[row] / parameters))
        for step in range(1, 9):
            height = 76 * every * sent[row] / sent["ddp"] if step % every == 0 else 0
            canvas.axes.bar(44 * step - 20, -height, 30, ground, color=color)
        canvas.axes.plot((4, 370), (ground, ground), color=theme.muted, lw=1.5)
        canvas.text(386, ground - 46, f"{sent[row]:,.0f} kB", color, fontsize=26, weight="bold")
        canvas.text(386, ground - 14, "a step")
    for step in range(1, 9):
        canvas.text(44 * step - 20, 474, str(step), theme.muted, ha="center")
    canvas.text(386, 474, f"of {parameters:,.0f}", theme.muted)
    canvas.text(386, 498, "parameters", theme.muted)


def two_way(canvas: Canvas) -> None:
    """Draw a two-way exchange of three workers, each of which owns one chunk of the vector.

    All workers send a chunk to its owner, which averages it and returns the mean to all of them.
    """
    colors = canvas.theme.first, canvas.theme.second, canvas.theme.kept
    halo = {"ha": "center", "bbox": {"facecolor": canvas.theme.page, "edgecolor": "none", "pad": 2}, "zorder": 4}

    # Draw the messages in chunks, the owners' means, and the whole mean on every worker.
    titles = (
        "Each worker's message, in three chunks",
        "Owners: the mean of one chunk each",
        "The mean, on every worker",
    )
    for row, title in enumerate(titles):
        top = 20 + 200 * row
        canvas.text(280, top, title, weight="bold", **halo)
        for worker in range(3):
            for chunk in range(3) if row != 1 else (worker,):
                color = colors[chunk] if row else "none"
                canvas.box(24 + 190 * worker + 44 * chunk, top + 18, 40, 40, colors[chunk], facecolor=color)
                if row < 2:
                    for to in (chunk,) if row == 0 else range(3):
                        end = 44 + 190 * to + 44 * chunk
                        canvas.arrow((44 + 190 * worker + 44 * chunk, top + 62), (end, top + 214), colors[chunk])

    canvas.text(280, 140, "1  compressed reduce-scatter", **halo)
    canvas.text(280, 340, "2  compressed all-gather", **halo)
    for worker in range(3):
        canvas.text(88 + 190 * worker, 496, f"worker {worker + 1}", canvas.theme.muted, ha="center")


def error_memory(canvas: Canvas) -> None:
    """Draw three rounds of TopK on six coordinates: the update plus the error memory, the message, the next memory."""
    theme, memory = canvas.theme, torch.zeros(6)
    updates = torch.tensor(
        [[1.0, 0.5, -0.2, 0.3, -0.7, 0.1], [0.3, 0.6, -0.3, 0.2, -0.1, 0.1], [0.1, 0.2, -0.4, 0.3, 0.1, 0.2]]
    )
    for i, heading in enumerate(("memory + change", "message", "next memory")):
        canvas.text(96 + 190 * i, 14, heading, weight="bold", ha="center")
    for round, update in enumerate(updates):
        before, v = memory, memory + update
        message = packsaddle.TopK(1 / 3)(v)
        memory, ground = v - message, 110 + 150 * round
        for i, (values, color) in enumerate(((v, theme.ink), (message, theme.first), (memory, theme.kept))):
            for place, value in enumerate(values.tolist()):
                canvas.axes.bar(31 + 190 * i + 26 * place, -55 * value, 18, ground, color=color)
            if i == 0:  # mark the part of the sum that is the error memory
                for place, value in enumerate(before.tolist()):
                    canvas.axes.bar(31 + 26 * place, -55 * value, 18, ground, color=theme.kept)
            canvas.axes.plot((12 + 190 * i, 180 + 190 * i), (ground, ground), color=theme.muted, lw=1.5)
        canvas.text(4, ground - 70, f"round {round + 1}", theme.muted)
        canvas.text(190, ground - 20, "=", ha="center")
        canvas.text(380, ground - 20, "+", ha="center")


def elastic(canvas: Canvas) -> None:
    """Draw a timeline of three workers: one leaves, one joins, and each round averages the workers that are present."""
    theme, starts = canvas.theme, (0, 0, 0, 2.4)
    canvas.text(4, 14, "Workers that leave and join", weight="bold")
    for round in range(1, 6):
        x = 90 + 90 * round
        canvas.axes.plot((x, x), (44, 290), color=theme.level, lw=2, zorder=0)
        canvas.text(x, 308, str((0, 3, 2, 3, 3, 3)[round]), ha="center")
    for worker, (start, end) in enumerate(zip(starts, (5.1, 1.5, 5.1, 5.1), strict=True)):
        y, color = 66 + 64 * worker, (theme.first, theme.second, theme.first, theme.kept)[worker]
        canvas.text(4, y, f"worker {worker}", color)
        canvas.axes.plot((90 + 90 * start, 90 + 90 * end), (y, y), color=color, lw=8)
        for round in range(math.ceil(start), math.floor(end) + 1):
            if round:
                canvas.dot(90 + 90 * round, y, theme.ink, 6)
    canvas.text(240, 130, "leaves: the others go on", theme.second)
    canvas.text(98, 232, "joins: it gets the anchor from a worker", theme.kept, 20)
    canvas.text(4, 308, "averaged")


def hook(canvas: Canvas) -> None:
    """Draw the steps by which packsaddle's hook replaces the all-reduce of a bucket in DistributedDataParallel."""
    theme = canvas.theme
    steps = (
        ("backward: a bucket's gradients g", theme.muted),
        ("v = e + g, with the error memory e", theme.muted),
        ("message C(v); residual e = v - C(v)", theme.kept),
        ("exchange of the messages", theme.first),
        ("p.grad = mean of all messages", theme.ink),
        ("optimizer.step(), as without it", theme.muted),
    )
    canvas.box(60, 70, 440, 254, theme.first, facecolor="none", linestyle="--")
    canvas.text(484, 206, "hook", theme.first, rotation=90, ha="center", weight="bold")
    for i, (words, color) in enumerate(steps):
        top = 8 + 84 * i - 10 * (i > 0) + 6 * (i == 1)
        canvas.box(90, top, 370, 48, color)
        canvas.text(275, top + 25, words, ha="center")
        if i:
            canvas.arrow((275, top - 34), (275, top), theme.muted)


def kilobytes() -> dict[str, float]:
    """Return the mean kB that each of two workers sends per step, by method, for the GPT in experiments/race."""
    with (ROOT / "experiments" / "race" / "curves.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["workers"], row["steps"], row["seed"]) == ("2", "600", "0")]
    return {row["contender"].partition(" lr=")[0]: float(row["sent"]) / 1e3 for row in rows if row["lr"] == "0.002"}


def unequal_speeds(canvas: Canvas) -> None:
    """Draw the steps of a fast and a slow worker in a round: with equal numbers of steps, and with paces."""
    theme, every, times, scale = canvas.theme, 8, (1, 3), 20.4
    ways = (
        ("Equal steps: the fast one waits", [every, every], 26),
        ('weight="steps": none waits', [12, 4], 206),
    )
    for title, steps, top in ways:
        canvas.text(4, top - 6, title, weight="bold")
        span = max(n * t for n, t in zip(steps, times, strict=True))
        for i, (n, t, color) in enumerate(zip(steps, times, (theme.first, theme.second), strict=True)):
            y = top + 42 + 56 * i
            canvas.text(4, y, ("fast", "slow")[i], color)
            for start in range(0, every * times[1], span):
                for k in range(n):
                    canvas.box(56 + scale * (start + k * t), y - 16, scale * t - 3, 32, color, facecolor=color, lw=0)
                if rest := span - n * t:
                    canvas.text(70 + scale * n * t, y, f"waits {rest / span:.0%} of the time", theme.muted)
        for end in range(span, every * times[1] + 1, span):
            x = 55 + scale * end
            canvas.axes.plot((x, x), (top + 16, top + 124), color=theme.ink, lw=2, linestyle="--")
        canvas.text(546, top - 6, f"{sum(steps) * every * times[1] // span} steps", weight="bold", ha="right")
    canvas.text(546, 352, "exchange", ha="right")
    canvas.text(4, 352, "A box is a step; time from left to right.", theme.muted)


PICTURES: dict[str, tuple[Callable[[Canvas], None], int]] = {
    "local-updates": (local_updates, 646),
    "algorithm": (algorithm, 704),
    "saddle": (saddle, 566),
    "wire": (wire, 512),
    "losses": (losses, 436),
    "times": (times, 436),
    "speed-ups": (speed_ups, 436),
    "sizes": (sizes, 436),
    "workers": (workers, 436),
    "unequal-speeds": (unequal_speeds, 370),
    "two-way": (two_way, 512),
    "error-memory": (error_memory, 430),
    "elastic": (elastic, 326),
    "hook": (hook, 490),
}


def write(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, (draw, height) in PICTURES.items():
        for shade, theme in THEMES.items():
            (out / f"{name}-{shade}.svg").write_text(svg(draw, height, theme))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
