"""nanoGPT's recipe for a CPU, on its text, with local updates of AdamW: validation losses of one, two and more workers.

The network has 4 layers, 4 heads, width 128 and no biases (0.80 million parameters); the recipe is 2,000 steps of 12
windows of 64 characters, AdamW with betas 0.9 and 0.99, a rate of 0.001 with 100 steps of warm-up and a cosine to a
tenth, and gradients clipped to norm 1. Its README reports a loss of 1.88 on tinyshakespeare. Each worker has 12 windows
a step, so W workers read W times as much text; "dense" is one process with the windows of all workers, which is what
DistributedDataParallel computes. Workers are simulated in one process. The loss is over all windows of the last tenth
of the text.

    python -m lab.bench.nanogpt run --text FOLDER/tinyshakespeare/input.txt --workers 2 4 --seeds 0 1 2
    python -m lab.bench.nanogpt run --text FOLDER/tinyshakespeare/input.txt --workers 2 --steps 1000 1250
    python -m lab.bench.nanogpt run --text library --workers 2 --rates 0.004 0.008 --out library.csv
    python -m lab.bench.nanogpt run --text FOLDER/tinyshakespeare/input.txt --size 0.1M --steps 667 --out sizes.csv

`--steps` shortens the whole recipe, its cosine too. `lab.bench.speed_ups` prints the tables.

    python -m lab.bench.nanogpt clock --text FOLDER/tinyshakespeare/input.txt --workers 2 \\
        --methods dense "local, overlap" --steps 2000 1429 --mbit 10

`clock` measures times: workers are processes on hosts with a slow link between them (root on Linux, see
`lab.bench.hosts`). One machine alone is timed while the other hosts are equally busy, with other seeds, since the hosts
share this machine's processor.

    torchrun --nproc-per-node 2 -m lab.bench.nanogpt run --tokens train.bin --size 124M --device cuda --workers 2 \\
        --methods dense "local, agreement" --steps 5000 --rates 0.0006 --seeds 0 --out rows.csv

Under torchrun each process is a worker, and "dense" is DistributedDataParallel. `--tokens` is a file of GPT-2's tokens
in nanoGPT's format, and 124M the size of GPT-2. On a GPU, networks compute in bfloat16.

The text is https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt (1.1 MB).
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import broadcast_object_list, is_torchelastic_launched
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import packsaddle
from lab.bench.hosts import Hosts
from lab.bench.texts import Text
from lab.origin import Origin
from lab.race.inner import Half, muon
from lab.rows import add_rows, read_rows
from packsaddle.comm import process_group, resolve

FOLDER = Path(__file__).parents[2] / "experiments" / "nanogpt"
ROWS, CLOCKED, SIZES = FOLDER / "runs.csv", FOLDER / "clock.csv", FOLDER / "sizes.csv"
BATCH, STEPS, RATE, WARM_UP = 12, 2000, 1e-3, 100
EVERY = 8  # steps between two rounds of local updates, the default of `LocalUpdates`


# A method is None for dense training, or further arguments of `LocalUpdates`, which send one bit per coordinate every 8
# steps. Local SGD and DiLoCo send their updates in 16 bits and uncompressed, as their other implementations can.
Method = Mapping[str, Any] | None
DILOCO, AGREEMENT = packsaddle.OuterSGD(0.7, 0.5), packsaddle.OuterAgreement(0.5)
TWO_BITS = packsaddle.Compression(packsaddle.Rounded())
PEER: Mapping[str, Any] = {
    "compressor": packsaddle.Compression(Half(), dense_below=0),
    "mean_momentum": 0.0,
    "keep_unsent": False,
}
METHODS: dict[str, Method] = {
    "dense": None,
    "local": {},
    "local, no mean momentum": {"mean_momentum": 0.0},
    "local, agreement": {"outer": AGREEMENT},
    "local, agreement, 16 bits": {"compressor": packsaddle.Compression(Half(), dense_below=0), "outer": AGREEMENT},
    "local 4, agreement": {"every": 4, "outer": AGREEMENT},
    "local 4, two bits, agreement": {"compressor": TWO_BITS, "every": 4, "outer": AGREEMENT},
    "local, overlap": {"overlap": 2},
    "local, agreement, overlap": {"outer": AGREEMENT, "overlap": 3},
    **{f"local SGD {every}, 16 bits": {**PEER, "every": every} for every in (8, 32, 128)},
    **{f"DiLoCo {every}, 16 bits": {**PEER, "every": every, "outer": DILOCO} for every in (32, 128)},
    "local, 12 and 4 steps": {"workers": packsaddle.Workers(weight="steps", steps=[12, 4])},  # for two workers only
}


@dataclass(frozen=True)
class Network:
    """The size of a network. The default is that of nanoGPT's recipe for a CPU."""

    width: int = 128
    layers: int = 4
    head: int = 32  # width of an attention head
    block: int = 64  # characters or tokens of a window


NETWORKS = {
    "0.05M": Network(64, 1),
    "0.1M": Network(64, 2),
    "0.3M": Network(96, 3),
    "0.8M": Network(),
    "124M": Network(768, 12, 64, 1024),  # without GPT-2's biases
}


@dataclass(frozen=True)
class Recipe(Network):
    """A training: its network, its length, its optimizer, and its learning rate by nanoGPT's schedule.

    The learning rate has a linear warm-up and a cosine to a tenth.
    """

    steps: int = STEPS
    rate: float = RATE  # the highest learning rate
    warm_up: int = WARM_UP  # steps
    batch: int = BATCH  # windows of a step of one worker
    inner: str = "adamw"  # or "muon", for hidden matrices

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warm_up:
            return self.rate * (step + 1) / (self.warm_up + 1)
        after = (step - self.warm_up) / (self.steps - self.warm_up)
        return 0.1 * self.rate + 0.45 * self.rate * (1 + math.cos(math.pi * after))


class Layer(nn.Module):
    """A transformer layer of nanoGPT: causal self-attention and an MLP, both after a norm and without biases."""

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, width // self.head, self.head).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(b, t, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """nanoGPT's network, whose output layer shares the weights of the embedding.

    A call returns the mean loss of predicting the characters or tokens y from x, int64[n, block] each.
    """

    def __init__(self, vocabulary: int, seed: int, size: Network = Network()) -> None:
        super().__init__()
        width, layers = size.width, size.layers
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(size.block, width)
        self.layers = nn.ModuleList(Layer(width, size.head) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        rng = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                is_residual = name.endswith(("out.weight", "down.weight"))
                p.data.normal_(0, 0.02 / (math.sqrt(2 * layers) if is_residual else 1), generator=rng)

    @property
    def size(self) -> int:
        """The number of parameters without those of the positions, as nanoGPT prints it."""
        return sum(p.numel() for p in self.parameters()) - self.places.weight.numel()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.tokens(x) + self.places.weight
        for layer in self.layers:
            h = layer(h)
        logits = functional.linear(self.norm(h), self.tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1), y.flatten())


class Trained(NamedTuple):
    """The result of a training, for one of its workers."""

    loss: float  # held-out loss of the final common model
    sent: int  # bytes that the worker sent
    seconds: float  # time of the training, without that of the held-out loss


def train(text: Text, how: Method, workers: int, seed: int, recipe: Recipe, device: str = "cpu") -> Trained:
    """Train as one of the workers.

    Dense training is one process, or by DistributedDataParallel if the process group has several.
    """
    # Make the recipe's network and optimizers.
    group, net = resolve(None), GPT(text.vocabulary, seed, recipe).to(device)
    begin, optimizers = time.monotonic(), make_optimizers(net, recipe)
    local = None if how is None else packsaddle.LocalUpdates(optimizers, model=net, **how)
    averaged = DistributedDataParallel(net) if how is None and group.size > 1 else net

    def loss(windows: Tensor) -> Tensor:
        x, y = windows[:, :-1].to(device), windows[:, 1:].to(device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=device != "cpu"):
            value: Tensor = averaged(x, y)
        return value

    # Each worker draws its own windows. If one process does dense training, it draws the windows of all workers.
    mine = range(workers) if how is None and group.size == 1 else [group.rank]
    generators = [torch.Generator().manual_seed(1000 * seed + worker) for worker in mine]
    step = 0
    while step < recipe.steps:
        for settings in (settings for optimizer in optimizers for settings in optimizer.param_groups):
            settings["lr"] = recipe.rate_at(step)
        net.zero_grad()
        loss(torch.cat([text.draw(recipe.batch, recipe.block, generator) for generator in generators])).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step = local.position // workers if local is not None and local.paces[0] > EVERY else step + 1

    if local is not None:
        local.flush()
    seconds = time.monotonic() - begin
    with torch.no_grad():
        held_out = text.last(recipe.block)
        total = sum(float(loss(windows)) * len(windows) for windows in held_out.split(max(1, 8192 // recipe.block)))
    ring = 2 * (workers - 1) * sum(4 * p.numel() for p in net.parameters()) * recipe.steps // workers
    return Trained(total / len(held_out), ring if local is None else local.ledger.total.sent, seconds)


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


def make(path: Path, text: Text, name: str, workers: int, seed: int, recipe: Recipe, device: str = "cpu") -> None:
    """Train one model and add its row to a file, unless the file already has this row.

    Under torchrun each process is a worker, and rank 0 adds the row.
    """
    setting = {"method": name, "workers": workers, "seed": seed} | asdict(recipe)
    # Rank 0 decides: on other machines there may be no such file.
    is_made = [any(all(row[k] == str(v) for k, v in setting.items()) for row in rows(path))]
    if is_torchelastic_launched():
        broadcast_object_list(is_made, device=torch.device("cpu"))
    if is_made[0]:
        return
    how, origin = METHODS[name], asdict(Origin.here(text=text.digest))
    if device != "cpu":
        origin["machine"] = torch.cuda.get_device_name()
    if is_torchelastic_launched():
        trained = train(text, how, workers, seed, recipe, device)
    else:
        processes = 1 if how is None else workers
        trained = packsaddle.simulate(lambda _: train(text, how, workers, seed, recipe, device), processes)[0]
    if resolve(None).rank == 0:
        add_rows(path, [setting | {"loss": round(trained.loss, 4), "sent": trained.sent} | origin])


def race(
    path: Path, source: Sequence[str], digest: str, name: str, count: int, recipe: Recipe, seed: int, mbit: int
) -> None:
    """Time a training by `count` workers, which are processes on as many hosts, and add its row to a file.

    One machine alone is timed beside other trainings of one machine, with the next seeds, on the other hosts. `source`
    has the options for the text, of which `digest` is the hash, and for the size of the network.
    """
    workers = 1 if METHODS[name] is None else count
    words = ["-m", "lab.bench.nanogpt", "worker", *source, "--methods", name]
    words += ["--steps", str(recipe.steps), "--rates", str(recipe.rate), "--warm-ups", str(recipe.warm_up)]
    words += ["--batches", str(recipe.batch), "--inner", recipe.inner, "--workers", str(workers), "--seeds"]
    with Hosts(count, mbit) as hosts:
        if workers == 1:
            outputs = hosts.run([[sys.executable, *words, str(seed + host)] for host in range(count)])
        else:
            outputs = hosts.torchrun([*words, str(seed)])
    row = {"method": name, "workers": workers, "hosts": count, "seed": seed, "mbit": mbit} | asdict(recipe)
    add_rows(path, [row | json.loads(outputs[0]) | asdict(Origin.here(threads=1, text=digest))])


def race_as_worker(text: Text, name: str, workers: int, seed: int, recipe: Recipe) -> None:
    """Train as one of the processes of `race`, and print the result as JSON."""
    torch.set_num_threads(1)
    with process_group() if workers > 1 else nullcontext():
        print(json.dumps(train(text, METHODS[name], workers, seed, recipe)._asdict()))


def rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of a file. Rows of earlier versions lack fields of the recipe, and had its usual values."""
    usual = {key: str(value) for key, value in asdict(Recipe()).items()}
    return read_rows(path, lambda row: row | {key: row.get(key) or value for key, value in usual.items()}, "row")


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("run", "clock", "worker"))
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--text", help="nanoGPT's input.txt, or \"library\" for the source of Python's library")
    texts.add_argument("--tokens", type=Path, help="a file of GPT-2's tokens in nanoGPT's format, uint16")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs="+", default=[STEPS])
    parser.add_argument("--rates", type=float, nargs="+", default=[RATE])
    parser.add_argument("--warm-ups", type=int, nargs="+", default=[WARM_UP])
    parser.add_argument("--batches", type=int, nargs="+", default=[BATCH], help="windows of a step of one worker")
    parser.add_argument("--inner", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--size", choices=list(NETWORKS), default="0.8M", help="millions of parameters")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for `run`")
    parser.add_argument("--mbit", type=int, default=10, help="rate of the link for `clock`, in Mbit/s")
    parser.add_argument("--out", type=Path, help="the file of the rows")
    options = parser.parse_args()
    text = Text.read(options.text) if options.tokens is None else Text.read_tokens(options.tokens)
    settings = product(options.steps, options.rates, options.warm_ups, options.batches)
    network = asdict(NETWORKS[options.size])
    recipes = [
        Recipe(**network, steps=steps, rate=rate, warm_up=warm_up, batch=batch, inner=options.inner)
        for steps, rate, warm_up, batch in settings
    ]
    if options.command == "worker":
        race_as_worker(text, options.methods[0], options.workers[0], options.seeds[0], recipes[0])
        return
    if options.command == "clock":
        source = ["--tokens", str(options.tokens)] if options.text is None else ["--text", options.text]
        out, words, count = options.out or CLOCKED, [*source, "--size", options.size], options.workers[0]
        for seed, (name, recipe) in product(options.seeds, zip(options.methods, recipes, strict=True)):
            race(out, words, text.digest, name, count, recipe, seed, options.mbit)
        return
    torch.set_num_threads(1)
    with process_group() if is_torchelastic_launched() else nullcontext():
        for seed, workers, name, recipe in product(options.seeds, options.workers, options.methods, recipes):
            if workers == 2 if name.endswith(" steps") else workers > 1 or name.startswith("dense"):
                make(options.out or ROWS, text, name, workers, seed, recipe, options.device)


if __name__ == "__main__":
    main()
