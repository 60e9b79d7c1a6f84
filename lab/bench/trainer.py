"""Evaluation loss of TopK 10% by scope in the Hugging Face Trainer: a small Llama, AdamW, two workers, two buckets.

pip install -e '.[hf]'
python -m lab.bench.trainer --out experiments/adamw/trainer.csv
python -m lab.bench.trainer --out experiments/adamw/trainer.csv --table
"""

import argparse
import csv
import logging
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import packsaddle
from lab.runs import DataConfig
from lab.runs.tasks import load_data
from packsaddle.comm import launch, process_group
from packsaddle.integrations.huggingface import PacksaddleCallback

SCOPES = ("dense", "bucket", "model")
WORKERS, STEPS, BATCH, EVALUATED = 2, 300, 16, 1024
FIELDS = ("scope", "seed", "steps", "evaluation_loss", "parameters", "buckets", "ms_a_step", "cpu_ms_a_step")


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Windows of 64 characters of the reference of the Python language."""

    def __init__(self, *, train: bool) -> None:
        self.text: Any = load_data(DataConfig("text"), None, train=train)
        self.count = len(self.text) if train else min(EVALUATED, len(self.text))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        codes, _ = self.text.batch(torch.tensor([index]), torch.device("cpu"))
        return {"input_ids": codes[0], "labels": codes[0]}


def train(scope: str, seed: int, rate: float, name: str) -> dict[str, object]:
    """Train one model, and return its row."""
    set_seed(seed)
    data = Windows(train=True)
    config = LlamaConfig(
        vocab_size=data.text.classes,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            seed=seed,
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
            ddp_find_unused_parameters=False,
            report_to="none",
            disable_tqdm=True,
        )
        model = LlamaForCausalLM(config)
        trainer = Trainer(model=model, args=training, train_dataset=data, eval_dataset=Windows(train=False))
        if scope != "dense":
            trainer.add_callback(PacksaddleCallback(trainer, packsaddle.TopK(0.1), scope=scope))
        start, cpu = time.perf_counter(), used()
        trainer.train()
        taken, cpu = time.perf_counter() - start, used() - cpu
        loss = trainer.evaluate()["eval_loss"]
    buckets = trainer.model_wrapped._get_ddp_logging_data().get("rebuilt_bucket_sizes", "").split(",")
    return {
        "scope": name or scope,
        "seed": seed,
        "steps": STEPS,
        "evaluation_loss": round(loss, 4),
        "parameters": sum(p.numel() for p in model.parameters()),
        "buckets": len(buckets),
        "ms_a_step": round(1e3 * taken / STEPS, 1),
        "cpu_ms_a_step": round(1e3 * cpu / STEPS, 1),
    }


def used() -> float:
    """Return the CPU seconds of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def work(jobs: list[tuple[str, int]], rate: float, name: str, out: str) -> None:
    with process_group():
        for scope, seed in jobs:
            row = train(scope, seed, rate, name)
            if torch.distributed.get_rank() == 0:
                new = not Path(out).exists()
                with Path(out).open("a", newline="") as file:
                    writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
                    if new:
                        writer.writeheader()
                    writer.writerow(row)
                print(row, flush=True)


def table(rows: list[dict[str, str]]) -> str:
    """Return the Markdown table of means and ranges over seeds."""
    lines = ["| scope | evaluation loss | processor ms a step |", "| --- | --- | --- |"]
    for scope in dict.fromkeys(row["scope"] for row in rows):
        losses, cpu = (
            [float(row[field]) for row in rows if row["scope"] == scope]
            for field in ("evaluation_loss", "cpu_ms_a_step")
        )
        loss = f"{statistics.fmean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"
        lines.append(f"| {scope} | {loss} | {statistics.median(cpu):.1f} ({min(cpu):.1f} to {max(cpu):.1f}) |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("experiments/adamw/trainer.csv"))
    parser.add_argument("--scopes", nargs="+", choices=SCOPES, default=SCOPES)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--name", default="", help="what to call the rows, in place of the scope")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    rows = list(csv.DictReader(options.out.open())) if options.out.exists() else []
    if options.table:
        print(table(rows))
        return
    done = {(row["scope"], int(row["seed"])) for row in rows}
    jobs = [(s, seed) for seed in options.seeds for s in options.scopes if (options.name or s, seed) not in done]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    launch(work, (jobs, options.rate, options.name, str(options.out)), WORKERS)


if __name__ == "__main__":
    main()
