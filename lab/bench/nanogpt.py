"""nanoGPT's recipe for a CPU, on its text, with local updates of AdamW: validation losses of one, two and more workers.

The network has 4 layers, 4 heads, width 128 and no biases (0.80 million parameters); the recipe is 2,000 steps of 12
windows of 64 characters, AdamW with betas 0.9 and 0.99, a rate of 0.001 with 100 steps of warm-up and a cosine to a
tenth, and gradients clipped to norm 1. Its README reports a loss of 1.88 on tinyshakespeare. Each worker has 12 windows
a step, so W workers read W times as much text; "dense" is one process with the windows of all workers, which is what
DistributedDataParallel computes. Nothing is tuned: local updates have the recipe's rate. Workers are simulated in one
process. The loss is over all windows of the last tenth of the text.

    python -m lab.bench.nanogpt run --text FOLDER/tinyshakespeare/input.txt --workers 2 4 --seeds 0 1 2
    python -m lab.bench.nanogpt run --text FOLDER/tinyshakespeare/input.txt --workers 2 --steps 1000 1250
    python -m lab.bench.nanogpt table

`--steps` shortens the whole recipe, its cosine too. The second table has the length at which W workers reach the loss
of one machine alone after 2,000 steps, interpolated in the logarithm of the steps, and the time of that many steps and
bytes over that of one machine.

    python -m lab.bench.nanogpt clock --text FOLDER/tinyshakespeare/input.txt \\
        --methods dense "local, overlap" --steps 2000 1429 --mbit 10

`clock` measures what the third table computes: workers are processes on hosts with a slow link between them (root on
Linux, see `lab.bench.hosts`). One machine alone is timed while the other host is equally busy, with another seed, since
the hosts share this machine's processor.

The text is https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt (1.1 MB).
"""

import argparse
import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import packsaddle
from lab.bench.hosts import Hosts
from lab.bench.origin import Origin
from lab.bench.rows_file import add_rows, read_rows
from lab.race.inner import Half, muon
from lab.race.library import library_text
from packsaddle.comm import process_group, resolve

SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
LIBRARY = "library"  # the name of the second text
FOLDER = Path(__file__).parents[2] / "experiments" / "nanogpt"
ROWS, CLOCKED = FOLDER / "runs.csv", FOLDER / "clock.csv"
BLOCK, BATCH, STEPS, RATE, WARM_UP = 64, 12, 2000, 1e-3, 100
WIDTH, LAYERS = 128, 4
WINDOWS = 1742  # windows of the last tenth of nanoGPT's text
HEAD = 32  # width of an attention head
EVERY = 8  # steps between two rounds of local updates, the default of `LocalUpdates`
LINKS = (10, 50, 200, 1000)  # rates of links, in Mbit/s
STEP_TIME = 0.055  # seconds of a step of 12 windows, if the worker has a core to itself


# A method is None for dense training, or further arguments of `LocalUpdates`, which send one bit per coordinate every 8
# steps. Local SGD and DiLoCo send their updates in 16 bits and uncompressed, as their other implementations can.
Method = Mapping[str, Any] | None
DILOCO = packsaddle.OuterSGD(0.7, 0.5)
PEER: Mapping[str, Any] = {
    "compressor": packsaddle.Compression(Half(), dense_below=0),
    "mean_momentum": 0.0,
    "keep_unsent": False,
}
METHODS: dict[str, Method] = {
    "dense": None,
    "local": {},
    "local, no mean momentum": {"mean_momentum": 0.0},
    "local, agreement": {"outer": packsaddle.OuterAgreement(0.5)},
    "local 4, two bits, agreement": {
        "compressor": packsaddle.Compression(packsaddle.Rounded()),
        "every": 4,
        "outer": packsaddle.OuterAgreement(0.5),
    },
    "local, overlap": {"overlap": 2},
    "local, agreement, overlap": {"outer": packsaddle.OuterAgreement(0.5), "overlap": 3},
    **{f"local SGD {every}, 16 bits": {**PEER, "every": every} for every in (8, 32, 128)},
    **{f"DiLoCo {every}, 16 bits": {**PEER, "every": every, "outer": DILOCO} for every in (32, 128)},
    "local, 12 and 4 steps": {"workers": packsaddle.Workers(weight="steps", steps=[12, 4])},  # for two workers only
}


class Layer(nn.Module):
    """A transformer layer of nanoGPT: causal self-attention and an MLP, both after a norm and without biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, width // HEAD, HEAD).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """nanoGPT's network, whose output layer shares the weights of the embedding.

    A call returns the mean loss of predicting the characters y from the characters x.
    """

    def __init__(self, characters: int, seed: int, width: int = WIDTH, layers: int = LAYERS) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(characters, width), nn.Embedding(BLOCK, width)
        self.layers, self.norm = nn.ModuleList(Layer(width) for _ in range(layers)), nn.LayerNorm(width, bias=False)
        rng = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                is_residual = name.endswith(("out.weight", "down.weight"))
                p.data.normal_(0, 0.02 / (math.sqrt(2 * layers) if is_residual else 1), generator=rng)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.tokens(x) + self.places.weight
        for layer in self.layers:
            h = layer(h)
        logits = functional.linear(self.norm(h), self.tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1), y.flatten())


@dataclass(frozen=True)
class Text:
    """A text as codes of its characters, int64[n]: its first nine tenths for training, and its last tenth."""

    train: Tensor
    held_out: Tensor
    characters: int
    digest: str = ""  # first 12 digits of the SHA-256

    @classmethod
    def read(cls, source: str) -> "Text":
        """Read nanoGPT's text from a file, or the source of Python's standard library if `source` is "library".

        Raises ValueError if the file has another text.
        """
        data = library_text().encode() if source == LIBRARY else Path(source).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if source != LIBRARY and digest != SHA256:
            raise ValueError(f"{source} must be tinyshakespeare, with the SHA-256 {SHA256}")
        text = data.decode()
        code = {character: i for i, character in enumerate(sorted(set(text)))}
        codes = torch.tensor([code[character] for character in text])
        cut = int(0.9 * len(codes))
        return cls(codes[:cut], codes[cut:], len(code), digest[:12])

    @property
    def last(self) -> Tensor:
        """The held-out windows, consecutive in nanoGPT's text and evenly spaced in a longer one, int64[n, 65]."""
        starts = torch.arange((len(self.held_out) - 1) // BLOCK) * BLOCK
        starts = starts[:: max(1, len(starts) // WINDOWS)]
        return self.held_out[starts[:, None] + torch.arange(BLOCK + 1)]


@dataclass(frozen=True)
class Recipe:
    """A training: its length, its optimizer, its network, and its learning rate by nanoGPT's schedule.

    The learning rate has a linear warm-up and a cosine to a tenth.
    """

    steps: int = STEPS
    rate: float = RATE  # the highest learning rate
    warm_up: int = WARM_UP  # steps
    batch: int = BATCH  # windows of a step of one worker
    inner: str = "adamw"  # or "muon", for hidden matrices
    width: int = WIDTH
    layers: int = LAYERS

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warm_up:
            return self.rate * (step + 1) / (self.warm_up + 1)
        after = (step - self.warm_up) / (self.steps - self.warm_up)
        return 0.1 * self.rate + 0.45 * self.rate * (1 + math.cos(math.pi * after))


class Trained(NamedTuple):
    """The result of a training, for one of its workers."""

    loss: float  # held-out loss of the final common model
    sent: int  # bytes that the worker sent
    seconds: float  # time of the training, without that of the held-out loss


def train(text: Text, how: Method, workers: int, seed: int, recipe: Recipe) -> Trained:
    """Train as one of the workers."""
    # Make the recipe's network and optimizer. Only matrices have weight decay.
    rank, net = resolve(None).rank, GPT(text.characters, seed, recipe.width, recipe.layers)
    begin, optimizers = time.monotonic(), make_optimizers(net, recipe)
    local = None if how is None else packsaddle.LocalUpdates(optimizers, model=net, **how)

    # Each worker draws its own windows. Dense training, which is one process, draws the windows of all workers.
    mine = range(workers) if how is None else [rank]
    generators = [torch.Generator().manual_seed(1000 * seed + worker) for worker in mine]
    step = 0
    while step < recipe.steps:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = recipe.rate_at(step)
        starts = torch.cat([torch.randint(len(text.train) - BLOCK, (recipe.batch,), generator=g) for g in generators])
        windows = text.train[starts[:, None] + torch.arange(BLOCK + 1)]
        net.zero_grad()
        net(windows[:, :-1], windows[:, 1:]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step = local.position // workers if local is not None and local.paces[0] > EVERY else step + 1

    if local is not None:
        local.flush()
    seconds = time.monotonic() - begin
    with torch.no_grad():
        pieces = text.last.split(128)
        total = sum(float(net(w[:, :-1], w[:, 1:])) * len(w) for w in pieces)
    if local is not None:
        sent = local.ledger.total.sent
    else:
        sent = (
            2 * (workers - 1) * sum(4 * p.numel() for p in net.parameters()) * recipe.steps // workers
        )  # ring all-reduce
    return Trained(total / len(text.last), sent, seconds)


def make_optimizers(net: GPT, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return the recipe's AdamW, which decays only matrices. "muon" is Muon for the layers' matrices before it."""
    hidden = [p for p in net.layers.parameters() if p.dim() >= 2 and recipe.inner == "muon"]
    rest = [p for p in net.parameters() if all(p is not each for each in hidden)]
    groups = [
        {"params": [p for p in rest if (p.dim() >= 2) is has_decay], "weight_decay": 0.1 * has_decay}
        for has_decay in (True, False)
    ]
    adamw = torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.99))
    return [muon(hidden, recipe.rate), adamw] if hidden else [adamw]


def make(path: Path, text: Text, name: str, workers: int, seed: int, recipe: Recipe) -> None:
    """Train one model and add its row to a file, unless the file already has this row."""
    setting = {"method": name, "workers": workers, "seed": seed} | asdict(recipe)
    if any(all(row[key] == str(value) for key, value in setting.items()) for row in rows(path)):
        return
    torch.set_num_threads(1)
    processes = 1 if METHODS[name] is None else workers
    loss, sent, _ = packsaddle.simulate(lambda _: train(text, METHODS[name], workers, seed, recipe), processes)[0]
    add_rows(path, [setting | {"loss": round(loss, 4), "sent": sent} | asdict(Origin.here(text=text.digest))])


def race(path: Path, source: str, name: str, count: int, recipe: Recipe, seed: int, mbit: int) -> None:
    """Time a training by `count` workers, which are processes on as many hosts, and add its row to a file.

    One machine alone is timed beside other trainings of one machine, with the next seeds, on the other hosts.
    """
    workers = 1 if METHODS[name] is None else count
    words = ["-m", "lab.bench.nanogpt", "worker", "--text", source, "--methods", name]
    words += ["--steps", str(recipe.steps), "--rates", str(recipe.rate), "--warm-ups", str(recipe.warm_up)]
    words += ["--batches", str(recipe.batch), "--inner", recipe.inner, "--workers", str(workers), "--seeds"]
    with Hosts(count, mbit) as hosts:
        if workers == 1:
            outputs = hosts.run([[sys.executable, *words, str(seed + host)] for host in range(count)])
        else:
            outputs = hosts.torchrun([*words, str(seed)])
    row = {"method": name, "workers": workers, "hosts": count, "seed": seed, "mbit": mbit} | asdict(recipe)
    text = Text.read(source).digest
    add_rows(path, [row | json.loads(outputs[0]) | asdict(Origin.here(threads=1, text=text))])


def race_as_worker(text: Text, name: str, workers: int, seed: int, recipe: Recipe) -> None:
    """Train as one of the processes of `race`, and print the result as JSON."""
    torch.set_num_threads(1)
    with process_group() if workers > 1 else nullcontext():
        print(json.dumps(train(text, METHODS[name], workers, seed, recipe)._asdict()))


def rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a file. Rows of earlier versions lack fields of the recipe, and had its usual values."""
    usual = {key: str(value) for key, value in asdict(Recipe()).items()}
    return read_rows(path, lambda row: row | {key: row.get(key) or value for key, value in usual.items()}, "row")


def at(found: Sequence[Mapping[str, str]], rate: float = RATE) -> list[Mapping[str, str]]:
    """Return the rows of one learning rate, with the recipe's warm-up and batch."""
    wanted = rate, WARM_UP, BATCH
    return [row for row in found if (float(row["rate"]), int(row["warm_up"]), int(row["batch"])) == wanted]


def searched(found: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Return the row of each method, number of workers, length and seed at the rate with the lowest loss.

    Rows with the recipe's own rate are left out, since it is not searched for, and those with another batch.
    """
    others = [row for row in found if float(row["rate"]) != RATE and int(row["batch"]) == BATCH]
    by_loss = sorted(others, key=lambda row: -float(row["loss"]))
    return list({(row["method"], row["workers"], row["steps"], row["seed"]): row for row in by_loss}.values())


def table(found: Sequence[Mapping[str, str]], steps: int = STEPS) -> str:
    """Return the Markdown table of all trainings of `steps` steps: mean loss over seeds, its range, megabytes sent."""
    lines = list[list[str]]()
    for workers, name in _settings(found, steps):
        mine = _of(found, workers, name, steps)
        losses = sorted(float(row["loss"]) for row in mine)
        extent = f"{losses[0]:.3f} to {losses[-1]:.3f}, {len(losses)}" if len(losses) > 1 else "one seed"
        sent = f"{int(mine[0]['sent']) / 1e6:,.4g}"
        lines.append([str(workers), name, f"{statistics.fmean(losses):.3f}", extent, sent])
    return _markdown(["workers", "method", "loss", "range, seeds", "MB sent by a worker"], lines)


@dataclass(frozen=True)
class Trial:
    """A training of several workers: its length in steps, and the number of bytes that each worker sends."""

    workers: int
    method: str
    rate: float  # the highest learning rate
    steps: float
    sent: float

    def speed_up(self, mbit: float) -> float:
        """Return the time of one machine alone, divided by the time of this training on a link of `mbit` Mbit/s.

        The time of an exchange counts only as far as it exceeds the time of the steps that overlap with it.
        """
        how = METHODS[self.method]
        overlap = how.get("overlap", 0) if how else 0
        hidden = overlap * STEP_TIME * self.steps / EVERY  # all methods with overlap have this period
        exchanges = 8 * self.sent / (mbit * 1e6)
        return STEPS * STEP_TIME / (self.steps * STEP_TIME + max(0.0, exchanges - hidden))


def speed_ups(found: Sequence[Mapping[str, str]], links: Sequence[int] = LINKS) -> str:
    """Return the Markdown table of the trainings of `reached`: their steps, and their speed-up over one machine alone.

    They are means over seeds, with the range of the speed-ups if there are several. `links` are the rates of the links
    in Mbit/s.
    """
    lines = list[list[str]]()
    for (workers, method), of_seeds in reached(found).items():
        rates = ", ".join(f"{rate:g}" for rate in sorted({one.rate for one in of_seeds}))
        steps = statistics.fmean(one.steps for one in of_seeds)
        cells = [str(workers), method, rates, str(len(of_seeds)), f"{steps:,.0f}"]
        lines.append(cells + [spread([one.speed_up(mbit) for one in of_seeds]) for mbit in links])
    return _markdown(["workers", "method", "rate", "seeds", "steps", *(f"{mbit:,} Mbit/s" for mbit in links)], lines)


def limits(found: Sequence[Mapping[str, str]], links: Sequence[int] = LINKS) -> str:
    """Return the Markdown table of the trainings of `unreached`, with upper limits on the methods' speed-ups.

    The columns are like those of `speed_ups`, with the loss in place of the number of seeds.
    """
    lines = list[list[str]]()
    for one, loss in unreached(found):
        cells = [str(one.workers), one.method, f"{one.rate:g}", f"{one.steps:,.0f}", f"{loss:.3f}"]
        lines.append(cells + [f"{one.speed_up(mbit):.2f}" for mbit in links])
    return _markdown(["workers", "method", "rate", "steps", "loss", *(f"{mbit:,} Mbit/s" for mbit in links)], lines)


def _markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines))


def spread(numbers: Sequence[float]) -> str:
    """Return the mean of some numbers as text, with their range if it is visible in two digits after the point."""
    low, high = f"{min(numbers):.2f}", f"{max(numbers):.2f}"
    return f"{statistics.fmean(numbers):.2f}" + (f" ({low} to {high})" if low != high else "")


def reached(found: Sequence[Mapping[str, str]]) -> dict[tuple[int, str], list[Trial]]:
    """Return the trainings that end at the same loss as one machine alone with the same seed, by workers and method.

    The length of a training is interpolated, in the logarithm of the steps, between a training with a higher and one
    with a lower loss. Seeds without two such trainings are left out.
    """
    trainings: dict[tuple[int, str], list[Trial]] = {}
    targets = {row["seed"]: float(row["loss"]) for row in _of(found, 1, "dense", STEPS)}
    for (workers, name), (seed, target) in product(_settings(found), targets.items()):
        seen = {int(row["steps"]): row for row in _of(found, workers, name) if row["seed"] == seed}
        longer = [n for n in sorted(seen) if float(seen[n]["loss"]) <= target]
        if workers > 1 and longer and longer[0] > min(seen):
            low, high = max(n for n in seen if n < longer[0]), longer[0]
            above, below = (float(seen[n]["loss"]) - target for n in (low, high))
            steps = math.exp(math.log(low) + math.log(high / low) * above / (above - below))
            one = Trial(workers, name, float(seen[high]["rate"]), steps, int(seen[high]["sent"]) * steps / high)
            trainings.setdefault((workers, name), []).append(one)
    return trainings


def unreached(found: Sequence[Mapping[str, str]]) -> Iterator[tuple[Trial, float]]:
    """Yield each method's longest training with seed 0 and its loss, if this is above the loss of one machine alone.

    The method needs more steps than this training has, so the speed-up of the training is an upper limit.
    """
    target = float(_of(found, 1, "dense", STEPS)[0]["loss"])
    for workers, name in _settings(found):
        last = max((row for row in _of(found, workers, name) if row["seed"] == "0"), key=lambda row: int(row["steps"]))
        if workers > 1 and (loss := float(last["loss"])) > target:
            yield Trial(workers, name, float(last["rate"]), int(last["steps"]), int(last["sent"])), loss


def _of(
    found: Sequence[Mapping[str, str]], workers: int, name: str, steps: int | None = None
) -> list[Mapping[str, str]]:
    """Return the rows of one method and number of workers, ordered by seed.

    `steps` selects trainings of this length; None selects all.
    """
    mine = [row for row in found if row["method"] == name and int(row["workers"]) == workers]
    return sorted((row for row in mine if steps in (None, int(row["steps"]))), key=lambda row: int(row["seed"]))


def _settings(found: Sequence[Mapping[str, str]], steps: int | None = None) -> list[tuple[int, str]]:
    """Return the numbers of workers and methods of all rows, or of those with this number of steps."""
    return sorted({(int(row["workers"]), row["method"]) for row in found if steps in (None, int(row["steps"]))})


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("run", "clock", "worker", "table"))
    parser.add_argument("--text", help="nanoGPT's input.txt, or \"library\" for the source of Python's library")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs="+", default=[STEPS])
    parser.add_argument("--rates", type=float, nargs="+", default=[RATE])
    parser.add_argument("--warm-ups", type=int, nargs="+", default=[WARM_UP])
    parser.add_argument("--batches", type=int, nargs="+", default=[BATCH], help="windows of a step of one worker")
    parser.add_argument("--inner", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--mbit", type=int, default=10, help="rate of the link for `clock`, in Mbit/s")
    parser.add_argument("--out", type=Path, help="the file of the rows")
    options = parser.parse_args()
    if options.command == "table":
        every = rows(options.out or ROWS)
        found = at(every)
        best = searched(every)
        print("\n\n".join([table(found), speed_ups(found), speed_ups(best), limits(best), table(found, STEPS // 2)]))
        return
    if options.text is None:
        parser.error(f"{options.command} needs --text")
    text = Text.read(options.text)
    network = options.inner, options.width, options.layers
    settings = product(options.steps, options.rates, options.warm_ups, options.batches)
    recipes = [Recipe(*one, *network) for one in settings]
    if options.command == "worker":
        race_as_worker(text, options.methods[0], options.workers[0], options.seeds[0], recipes[0])
        return
    if options.command == "clock":
        for seed, (name, recipe) in product(options.seeds, zip(options.methods, recipes, strict=True)):
            race(options.out or CLOCKED, options.text, name, options.workers[0], recipe, seed, options.mbit)
        return
    for seed, workers, name, recipe in product(options.seeds, options.workers, options.methods, recipes):
        if workers == 2 if name.endswith(" steps") else workers > 1 or name.startswith("dense"):
            make(options.out or ROWS, text, name, workers, seed, recipe)


if __name__ == "__main__":
    main()
