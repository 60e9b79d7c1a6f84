"""Real workers under torchft that are killed, stopped, told to leave and added, as lab/bench/elastic.py has them."""

import contextlib
import importlib.util
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_python import environment, python

ROOT = Path(__file__).parents[2]
needs_torchft = pytest.mark.skipif(importlib.util.find_spec("torchft") is None, reason="torchft is not installed")
pytestmark = pytest.mark.process


@contextlib.contextmanager
def crew(folder: Path, workers: int, least: int = 1, **spec: Any) -> Iterator[tuple[Any, Any]]:
    """The benchmark, and workers of it under a lighthouse of their own."""
    from lab.bench import elastic

    elastic.CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "packsaddle"])
    with elastic.lighthouse(least) as address:
        first = elastic.Spec("", address, "", 4, 10**6, None, step=0.03, seed=0, until=str(folder / "over"))
        found = elastic.Crew(folder, elastic.replace(first, **spec))
        for i in range(workers):
            found.start(f"w{i}")
        try:
            yield elastic, found
        finally:
            found.end()


def reached(benchmark: Any, workers: Any, log: int, more: int) -> None:
    """Wait until a worker, by the number of its log, has been in so many more rounds."""
    at = len(rounds(workers.read()[log])) + more
    assert benchmark._until(lambda: len(rounds(workers.read()[log])) >= at, 90), workers.read()


def ended(benchmark: Any, workers: Any) -> list[list[dict[str, Any]]]:
    """What the workers have said, once all that are alive have ended; nobody may be at odds with another."""
    (workers.folder / "over").touch()
    assert benchmark._until(lambda: not workers.alive(), 90), workers.read()
    logs: list[list[dict[str, Any]]] = workers.read()
    assert [line for lines in logs for line in lines if line["event"] == "error"] == []
    found = benchmark.account(logs)
    assert found["wrong"] == []
    assert found["accounted"] >= 5
    return logs


def rounds(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] == "round"]


@needs_torchft
def test_one_is_killed_and_one_comes(tmp_path: Path) -> None:
    """Rounds go on with two; the newcomer has the others' anchor, step and position."""
    with crew(tmp_path, 3) as (benchmark, workers):
        for log in range(3):
            reached(benchmark, workers, log, 1)
        workers.signal("w1", signal.SIGKILL)
        reached(benchmark, workers, 0, 2)
        workers.start("w3")
        reached(benchmark, workers, 3, 2)
        logs = ended(benchmark, workers)
    seen = [line["workers"] for line in rounds(logs[0])]
    gap = seen.index(2, seen.index(3))
    assert 3 in seen[gap:]
    join = logs[3][0]
    (same,) = [line for line in rounds(logs[0]) if line["history"] == join["history"]]
    assert {key: join[key] for key in ("hash", "position", "round")} == {
        key: same[key] for key in ("hash", "position", "round")
    }
    assert join["steps"] >= 8
    assert not any(join["pending"])


@needs_torchft
@pytest.mark.parametrize(("grace", "code"), [(60.0, 0), (0.5, 1)])
def test_one_is_told_to_leave_while_it_waits_for_others(grace: float, code: int, tmp_path: Path) -> None:
    """Their next round has all that it has not sent, or it is lost where the grace is over sooner."""
    with crew(tmp_path, 1, grace=grace) as (benchmark, workers):
        workers.start("w1", step=0.7)
        reached(benchmark, workers, 0, 4)
        time.sleep(1.0)  # in which it has done its steps, and the other not
        workers.signal("w0", signal.SIGTERM)
        workers.processes["w0"].join(60)
        assert not workers.processes["w0"].is_alive()
        reached(benchmark, workers, 1, 1 + code)
        logs = ended(benchmark, workers)
    assert (logs[0][-1]["event"], logs[0][-1]["code"]) == ("left", code)


@needs_torchft
def test_one_is_stopped_for_a_while(tmp_path: Path) -> None:
    """The others go on without it, and what it had moved is in a later round."""
    with crew(tmp_path, 3) as (benchmark, workers):
        for log in range(3):
            reached(benchmark, workers, log, 1)
        workers.signal("w2", signal.SIGSTOP)
        reached(benchmark, workers, 0, 3)
        workers.signal("w2", signal.SIGCONT)
        reached(benchmark, workers, 2, 2)
        logs = ended(benchmark, workers)
    seen = [line["workers"] for line in rounds(logs[0])]
    gap = seen.index(2, seen.index(3))
    assert 3 in seen[gap:]


@needs_torchft
def test_a_confirmation_that_breaks_on_one_worker(tmp_path: Path) -> None:
    """The other commits the round. What was sent is in its anchor, once: the mean of both workers' own accounts."""
    with crew(tmp_path, 1) as (benchmark, workers):
        workers.start("w1", fault=3)
        reached(benchmark, workers, 1, 4)
        logs = ended(benchmark, workers)
    told = {line["history"] for line in rounds(logs[1])}
    fault = next(i for i, line in enumerate(rounds(logs[1])) if not line["sends"])
    late = rounds(logs[1])[fault]  # it only listened in this round, having sent in the one before
    (before,) = [i for i, line in enumerate(rounds(logs[0])) if line["history"] in late["past"]]
    silent, sooner = rounds(logs[0])[before], rounds(logs[0])[before - 1]
    assert silent["history"] not in told
    assert silent["workers"] == 2
    for i in range(benchmark.DIRECTIONS):
        moved = sooner["anchor"][i] - silent["anchor"][i]
        sent, freed = silent["sent"][i] + late["sent"][i], silent["freed"][i] + late["freed"][i]
        assert moved == pytest.approx(sent / 2 + freed, abs=1e-9)


@needs_torchft
def test_the_example(tmp_path: Path) -> None:
    from lab.bench import elastic

    with elastic.lighthouse(2) as address:
        command = [python(), str(ROOT / "examples" / "elastic.py"), "--lighthouse", address, "--rounds", "4"]
        command += ["--min-workers", "2"]
        env = environment(RUST_LOG="error")
        started = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
            for _ in range(2)
        ]
        printed = [process.communicate(timeout=100) for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    weights = {out.split("weights ")[1] for out, _ in printed}
    assert len(weights) == 1
    assert all("round 4: loss" in out and "2 workers" in out for out, _ in printed)


@needs_torchft
def test_configured_runs(tmp_path: Path) -> None:
    """Two commands train one model, each into a folder of its own, with steps and epochs of both together."""
    from lab.bench import elastic

    config = tmp_path / "local.toml"
    config.write_text(LOCAL)
    with elastic.lighthouse(2) as address:
        command = [python(), "-m", "lab", "run", str(config), "--elastic", address, "--out"]
        env = environment(RUST_LOG="error")
        folders = [tmp_path / name for name in "ab"]
        started = [
            subprocess.Popen([*command, str(f)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
            for f in folders
        ]
        printed = [process.communicate(timeout=150) for process in started]
    assert [process.returncode for process in started] == [0, 0], printed
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]
    assert summaries[0]["test_loss"] == summaries[1]["test_loss"]
    assert summaries[0]["elastic"]["workers"] == 2
    lines = [json.loads(line) for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == summaries[0]["steps"] == 74
    weights = [torch.load(folder / "checkpoint" / "model.pt", weights_only=True) for folder in folders]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


LOCAL = """
lr = 0.01
epochs = 2
batch_size = 16
log_every = 5
[data]
name = "digits"
limit = 600
[model]
name = "autoencoder"
widths = [64, 16]
[compressor]
kind = "TopK"
ratio = 0.1
[local]
every = 4
optimizer = "adamw"
"""


@pytest.mark.parametrize(
    ("torchft", "line"),
    [
        (False, "elastic training needs torchft: pip install 'packsaddle[torchft]'"),
        pytest.param(True, "no lighthouse at http://localhost:1 (Connection refused)", marks=needs_torchft),
    ],
)
def test_what_is_missing_is_one_line(torchft: bool, line: str) -> None:
    example = ROOT / "examples" / "elastic.py"
    hidden = "" if torchft else "sys.modules['torchft'] = None; "
    code = f"import runpy, sys; {hidden}sys.path.insert(0, {str(example.parent)!r}); "
    code += f"sys.argv[:] = ['elastic.py', '--lighthouse', 'http://localhost:1']; runpy.run_path({str(example)!r}, "
    code += "run_name='__main__')"
    done = subprocess.run([python(), "-c", code], capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"elastic.py: error: {line}")
    assert done.stderr.count("\n") == 1
