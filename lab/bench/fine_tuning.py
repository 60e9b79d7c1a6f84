"""Fine-tuning with local updates of AdamW: losses and bytes of a gate on bfloat16, one bit and two bits, two workers.

A character transformer of 123,000 parameters is pretrained on the first half of tinyshakespeare (400 steps of 16
windows), and fine-tuned on Python's language reference, whole ("full") or by added factors of rank 4 in the linear
layers of its blocks ("lora"). 128 steps of two workers with 8 windows each, AdamW with betas 0.9 and 0.99, a warm-up of
13 steps and a cosine to a tenth. Workers are simulated in one process; dense training has all windows.

    python -m lab.bench.fine_tuning run --text FOLDER/tinyshakespeare/input.txt
    python -m lab.bench.fine_tuning table
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

import packsaddle
from lab.bench.origin import Origin
from lab.bench.rows_file import add_rows, read_rows
from lab.race.inner import held_out_loss
from lab.race.recipe import share_of_peak
from lab.race.workload import evenly_spaced
from lab.runs import ModelConfig
from lab.runs.tasks import Batches, make_task, shard
from lab.runs.tasks.text import Text
from packsaddle.comm import resolve
from packsaddle.compressors import Compressor, Identity, Rounded, Sign, TopK
from packsaddle.compressors.sparse import _CodedSupport
from packsaddle.compressors.values import ValueFormat, value_retention

ROWS = Path(__file__).parents[2] / "experiments" / "fine-tuning" / "runs.csv"
MODEL = ModelConfig("char-transformer", width=64, depth=2, heads=4)
STEPS, BATCH, PRETRAINING, WORKERS, RANK, CONTEXT = 128, 8, 400, 2, 4, 64
RATES = {"full": (1e-4, 1e-5, 1e-6), "lora": (1e-3, 1e-4, 1e-5)}


@dataclass(frozen=True)
class Visible(_CodedSupport):
    """PULSE's gate (arXiv 2602.03839): the coordinates whose change is visible in bfloat16.

    A coordinate of v is sent if the anchor less v, rounded to bfloat16, differs from the anchor, rounded likewise. The
    anchor is set after construction, and is the live vector. Without one, of zeros, all coordinates but zeros are sent.
    """

    values: ValueFormat | None = "bfloat16"
    anchor: Tensor | None = field(default=None, compare=False, repr=False, metadata={"internal": True})
    fixed_size: ClassVar[bool] = False

    def mu(self, d: int) -> float:
        """Return the contraction without an anchor. With one there is none: a small enough v is not sent at all."""
        return value_retention(self.values)

    def select(self, v: Tensor) -> Tensor:
        """Return the indices of the visible coordinates."""
        if self.anchor is None:
            return v.nonzero().squeeze(1)
        rounded = self.anchor.to(torch.bfloat16)
        return (rounded != (self.anchor - v).to(torch.bfloat16)).nonzero().squeeze(1)


@dataclass(frozen=True)
class Method:
    """Dense training without a compressor, else local updates."""

    compressor: Compressor | None = None
    every: int = 8
    dense_below: int = 0


SIGN = Sign(per_tensor=True)
METHODS = {
    "dense": Method(),
    "one bit, every 8": Method(SIGN),
    "two bits, every 8": Method(Rounded()),
    "TopK 1/16 int2, every 8": Method(TopK(1 / 16, values="int2")),
    "Visible bfloat16, every 8": Method(Visible()),
    "Visible int8, every 8": Method(Visible("int8")),
    "one bit, every 32": Method(SIGN, 32),
    "Visible int8, every 32": Method(Visible("int8"), 32),
    "one bit, every 8, vectors uncompressed": Method(SIGN, dense_below=1024),
}


class Adapted(nn.Module):
    """A linear layer with a frozen weight W, and factors: x -> W x + bias + 2 B A x, where B is 0 at first."""

    def __init__(self, base: nn.Linear, rng: torch.Generator) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.empty(RANK, base.in_features).normal_(0, base.in_features**-0.5, generator=rng))
        self.b = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer."""
        return self.base(x) + 2 * (x @ self.a.T) @ self.b.T


def adapt(task: nn.Module, seed: int) -> None:
    """Freeze a network, and add factors to the linear layers of its blocks."""
    task.requires_grad_(False)
    rng = torch.Generator().manual_seed(seed)
    for name, module in list(task.named_modules()):
        for child, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear) and "blocks" in name:
                setattr(module, child, Adapted(layer, rng))


def text_of(characters: str) -> tuple[Text, Text]:
    """Return the first nine tenths of a text, and the rest; the code of a character is its ASCII code."""
    codes = torch.tensor([min(ord(c), 127) for c in characters], dtype=torch.int16)
    cut, vocabulary = 9 * len(codes) // 10, "".join(map(chr, range(1, 128)))
    parts = codes[:cut], codes[cut:]
    train, rest = (Text(part[: (len(part) - 1) // CONTEXT * CONTEXT + 1], CONTEXT, vocabulary) for part in parts)
    return train, rest


@cache
def reference() -> tuple[Text, Text]:
    """Return the language reference of this Python, in two parts."""
    from pydoc_data.topics import topics

    return text_of("\n".join(topics[name] for name in sorted(topics)))


@cache
def pretrained(path: Path, seed: int) -> Mapping[str, Tensor]:
    """Return the weights after training on the first half of a text."""
    characters = path.read_text()
    data, _ = text_of(characters[: len(characters) // 2])
    task = make_task(MODEL, data.shape, data.classes, seed=seed)
    optimizer = torch.optim.AdamW(task.parameters(), 3e-3, betas=(0.9, 0.99))
    batches = Batches(shard(data, "iid", worker=0, workers=1, seed=seed), 16, worker=0, seed=seed)
    for step in range(PRETRAINING):
        optimizer.param_groups[0]["lr"] = 3e-3 * share_of_peak(step, 40, PRETRAINING)
        optimizer.zero_grad()
        loss = task(*data.batch(batches[step], torch.device("cpu")))
        loss.backward()
        nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
    return {name: weight.clone() for name, weight in task.state_dict().items()}


def train(weights: Mapping[str, Tensor], what: str, how: Method, rate: float, seed: int) -> dict[str, float]:
    """Fine-tune as this worker; return losses before and after, bytes and the coordinates that the messages contain."""
    data, held_out = reference()
    rank, cpu = resolve(None).rank, torch.device("cpu")
    task = make_task(MODEL, data.shape, data.classes, seed=0)
    task.load_state_dict(weights)
    if what == "lora":
        adapt(task, seed)
    trained = [p for p in task.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, rate, betas=(0.9, 0.99), weight_decay=0.01)
    local, d = None, sum(p.numel() for p in trained)
    if how.compressor is not None:
        compressor = replace(how.compressor) if isinstance(how.compressor, Visible) else how.compressor
        spec = packsaddle.Compression(compressor, exchange="direct", dense_below=how.dense_below)
        local = packsaddle.LocalUpdates(optimizer, spec, every=how.every, model=task)
        if isinstance(compressor, Visible):
            (part,) = local._fragments
            object.__setattr__(compressor, "anchor", part.anchor.flat[: part.compressed_d])

    def loss_now() -> float:
        with torch.no_grad():
            return held_out_loss(task, held_out, evenly_spaced(len(held_out), 256))

    before = loss_now()
    mine = range(WORKERS) if local is None else [rank]
    shards = [shard(data, "iid", worker=i, workers=WORKERS, seed=seed) for i in mine]
    batches = [Batches(part, BATCH, worker=i, seed=seed) for i, part in zip(mine, shards, strict=True)]
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate * share_of_peak(step, 13, STEPS)
        optimizer.zero_grad()
        task(*data.batch(torch.cat([batch[step] for batch in batches]), cpu)).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()

    if local is None:
        return {"before": before, "loss": loss_now(), "anchor_loss": loss_now(), "sent": 4 * d * STEPS, "d": d}
    sent = sum(moved.sent for purpose, moved in local.ledger.by_purpose.items() if purpose != "start")
    with local.at_anchor():
        anchor_loss = loss_now()
    local.flush(Identity())
    return {"before": before, "loss": loss_now(), "anchor_loss": anchor_loss, "sent": sent, "d": d}


def make(path: Path, text: Path, what: str, name: str, rate: float, seed: int) -> None:
    """Fine-tune, and add a row to a file, unless it has this one already."""
    key = (what, name, rate, seed)
    if any((r["what"], r["method"], float(r["rate"]), int(r["seed"])) == key for r in rows(path)):
        return
    how, weights = METHODS[name], pretrained(text, seed)
    found = packsaddle.simulate(
        lambda _: train(weights, what, how, rate, seed), WORKERS if how.compressor is not None else 1
    )[0]
    losses = {key: round(found[key], 5) for key in ("before", "loss", "anchor_loss")}
    row = {"what": what, "method": name, "rate": rate, "seed": seed, **losses, "sent": found["sent"], "d": found["d"]}
    add_rows(path, [row | asdict(Origin.here())])


def rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file."""
    return read_rows(path, dict, "row")


def table(found: Sequence[Mapping[str, str]], what: str) -> str:
    """Return the Markdown table of one way of fine-tuning: bits of a coordinate and step, and losses above dense."""
    rates = RATES[what]
    lines = [f"| | {' | '.join(f'{rate:g}: bits, loss' for rate in rates)} |", "| --- " * (1 + len(rates)) + "|"]
    by_key = {(r["method"], float(r["rate"]), r["seed"]): r for r in found if r["what"] == what}
    for name in METHODS:
        cells = []
        for rate in rates:
            mine = [r for (method, at, _), r in by_key.items() if (method, at) == (name, rate)]
            if not mine:
                cells.append("")
                continue
            bits = statistics.fmean(8 * int(r["sent"]) / int(r["d"]) / STEPS for r in mine)
            losses = [float(r["loss"]) for r in mine]
            over = [float(r["loss"]) - float(by_key["dense", rate, r["seed"]]["loss"]) for r in mine]
            anchor = [float(r["anchor_loss"]) - float(by_key["dense", rate, r["seed"]]["loss"]) for r in mine]
            spread = f"{statistics.fmean(over):+.4f} ({min(over):+.4f} to {max(over):+.4f})"
            spread += f", anchor {statistics.fmean(anchor):+.4f}"
            gain = statistics.fmean(float(r["before"]) for r in mine)
            shown = f"{statistics.fmean(losses):.4f} (before {gain:.4f})" if name == "dense" else spread
            cells.append(f"{bits:.3f}, {shown} [{len(mine)}]")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--text", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--out", type=Path, default=ROWS)
    options = parser.parse_args()
    if options.command == "table":
        for what in RATES:
            print(what, table(rows(options.out), what), sep="\n\n", end="\n\n")
        return
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for what, rates in RATES.items():
            for rate in rates:
                for name in options.methods:
                    if what == "lora" or METHODS[name].dense_below == 0:
                        make(options.out, options.text, what, name, rate, seed)


if __name__ == "__main__":
    main()
