"""Functions that compare the results of interrupted runs of the command line with those of uninterrupted runs."""

import json
from pathlib import Path
from typing import Any

import torch

CONFIG = """
lr = 0.5
epochs = 1
batch_size = 16
log_every = 10
[data]
name = "digits"
limit = 640
[model]
name = "autoencoder"
widths = [64, 16]
[compressor]
kind = "TopK"
ratio = 0.1
[noise]
std = 0.001
"""


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Return the lines of a run's .jsonl file, without recorded times."""
    path = folder / name
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in line.items() if "seconds" not in k} for line in found]


def tensors(value: Any) -> Any:
    """Return a nested state in which tensors are replaced by lists."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: tensors(inner) for key, inner in value.items()}
    return [tensors(inner) for inner in value] if isinstance(value, list | tuple) else value


def result(folder: Path) -> dict[str, Any]:
    """Return all results in a run's folder exactly, except for recorded times."""
    summary = json.loads((folder / "summary.json").read_text())
    checkpoints = {p.name: tensors(torch.load(p, weights_only=True)) for p in (folder / "checkpoint").glob("*.pt")}
    iterates = {p.name: tensors(torch.load(p, weights_only=True)) for p in folder.glob("iterates/*.pt")}
    return {
        "summary": {k: v for k, v in summary.items() if k not in ("seconds", "label")},
        "metrics": lines(folder),
        "certificates": lines(folder, "certificates.jsonl"),
        "checkpoints": checkpoints,
        "iterates": iterates,
        "files": sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()),
    }


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Return the places at which two results differ. NaN equals NaN."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = dict.fromkeys([*a, *b])
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{where}/{k}")]
    same = a == b or json.dumps(a) == json.dumps(b)
    return [] if same else [f"{where}: {str(a)[:200]} and {str(b)[:200]}"]
