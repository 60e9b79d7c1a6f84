"""The examples as a user runs them, with the real libraries; and what frameworks' checkpoints keep of the hook."""

import csv
import importlib.util
import json
import os
import re
import socket
import subprocess
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import forked_python
import pytest
import torch
import torch.distributed as dist
from nightly import thinned
from torch.nn.parallel import DistributedDataParallel

from packsaddle import Compression, TopK, register_ddp_hook
from packsaddle.comm.group import resolve
from packsaddle.curvature.certificate import Verdict
from packsaddle.integrations import load_state, measures, save_state
from packsaddle.integrations.callbacks import attach_local_updates

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("examples")  # each run once
EXAMPLES = ROOT / "examples"
LIBRARIES = {"ddp": "sklearn", "lightning": "lightning", "accelerate": "accelerate", "huggingface": "transformers"}
FRAMEWORKS = ("lightning.pytorch", "transformers.trainer")  # imported once, for all examples
# What exchanges local updates: the command, the library, its steps, the exchanges among them and at the end.
LOCAL: dict[str, tuple[list[str], str, int, int]] = {
    "torchrun": (["local_updates.py", "--checkpoint", "local", "--steps", "90"], "torch", 90, 11 + 1),
    "lightning": (["lightning_example.py", "--local-updates", "--out", "l"], "lightning", 176, 22 + 1),
    "accelerate": (["accelerate_local_updates.py", "--checkpoint", "a"], "accelerate", 176, 22 + 1),
    "huggingface": (["huggingface_example.py", "--local-updates", "--out", "h"], "transformers", 80, 10 + 1),
    "trl": (["trl_lora.py", "--out", "t"], "trl", 80, 10 + 1),
}
LINE = re.compile(
    r"worker (?P<rank>\d+): loss (?P<first>[\d.]+) -> (?P<last>[\d.]+), (?P<steps>\d+) steps, "
    r"(?:(?P<exchanges>\d+) exchanges, sent (?P<sent>[\d,]+) bytes, DistributedDataParallel alone (?P<alone>[\d,]+) .*"
    r"|nothing sent), weights (?P<weights>\w+)"
)


def needs(library: str) -> None:
    """Skip without the library, which is not imported for it: here warnings are errors, also its own."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


def run(command: list[Any], folder: Path, **environment: str) -> str:
    """Run a command in a folder and return what it printed."""
    given = forked_python.environment(**{"PYTHON_EXEC": forked_python.python(*FRAMEWORKS), **environment})
    done = subprocess.run([str(c) for c in command], cwd=folder, env=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def torchrun(*arguments: Any) -> list[Any]:
    return forked_python.torchrun(*arguments)


@cache
def example(name: str, folder: Path) -> list[dict[str, str]]:
    """What the workers of an example said, by rank; run once."""
    return workers_of(["ddp.py", "--checkpoint", "saved"] if name == "ddp" else [f"{name}_example.py"], folder)


@cache
def local_example(name: str, folder: Path) -> list[dict[str, str]]:
    """The same of an example of local updates."""
    return workers_of(LOCAL[name][0], folder)


def workers_of(what: list[str], folder: Path) -> list[dict[str, str]]:
    printed = run(torchrun(EXAMPLES / what[0], *what[1:]), folder)
    return sorted((m.groupdict() for m in LINE.finditer(printed)), key=lambda worker: worker["rank"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.mark.parametrize("name", thinned(LIBRARIES, 2))
def test_examples_train_with_little_traffic(name: str, folder: Path) -> None:
    needs(LIBRARIES[name])
    workers = example(name, folder)
    assert [w["rank"] for w in workers] == ["0", "1"]
    assert len({w["weights"] for w in workers}) == 1
    for worker in workers:
        assert int(worker["exchanges"]) == int(worker["steps"]) == (80 if name == "huggingface" else 176)
        times_fewer = 6 if name == "huggingface" else 20  # QSGD(127), TopK(0.01)
        assert int(worker["sent"].replace(",", "")) < int(worker["alone"].replace(",", "")) / times_fewer
        assert float(worker["last"]) < float(worker["first"]) / 2


@pytest.mark.parametrize("name", LOCAL)
def test_examples_of_local_updates_train_with_little_traffic(name: str, folder: Path) -> None:
    _, library, steps, rounds = LOCAL[name]
    needs(library)
    workers = local_example(name, folder)
    assert [w["rank"] for w in workers] == ["0", "1"]
    assert len({w["weights"] for w in workers}) == 1
    for worker in workers:
        assert (int(worker["steps"]), int(worker["exchanges"])) == (steps, rounds)
        assert 0 < int(worker["sent"].replace(",", "")) < int(worker["alone"].replace(",", "")) / 20
        assert float(worker["last"]) < float(worker["first"]) / 2


def test_lightnings_run_is_that_of_the_plain_loop(folder: Path) -> None:
    """The same seeds, batches and optimizer: the callback does what the line in the loop does, bit for bit."""
    needs("lightning")
    assert example("lightning", folder)[0]["weights"] == example("ddp", folder)[0]["weights"]


def test_lightning_logs_bytes_and_certificates(folder: Path) -> None:
    needs("lightning")
    workers = example("lightning", folder)
    with (folder / "runs" / "lightning" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    exchanges = [row for row in rows if row["packsaddle/steps"]]
    assert [float(row["packsaddle/steps"]) for row in exchanges] == list(range(10, 177, 10))
    assert all(float(row["packsaddle/sent_in_step"]) > 0 and row["loss"] for row in exchanges)
    assert all(0 < float(row["packsaddle/mu"]) < 1 and float(row["packsaddle/skipped"]) == 0 for row in exchanges)
    sent = [float(row["packsaddle/sent"]) for row in exchanges]
    assert sorted(sent) == sent
    assert sent[-1] < int(workers[0]["sent"].replace(",", ""))
    certified = [row for row in rows if row["certificate/grad_norm"]]
    assert [row["step"] for row in certified] == ["88", "176"]
    assert all(
        float(row["certificate/lambda_min_lower"]) < float(row["certificate/lambda_min_upper"]) for row in certified
    )


def test_the_trainer_logs_bytes(folder: Path) -> None:
    needs("transformers")
    example("huggingface", folder)
    state = json.loads((folder / "runs" / "huggingface" / "checkpoint-80" / "trainer_state.json").read_text())
    found = [line for line in state["log_history"] if "packsaddle/sent" in line]
    assert [line["step"] for line in found] == list(range(10, 81, 10))
    assert all(line["packsaddle/steps"] == line["step"] and 0 < line["packsaddle/mu"] < 1 for line in found)
    assert sum("loss" in line for line in state["log_history"]) == len(found)


def test_the_trainer_certifies_the_anchor(tmp_path: Path) -> None:
    """Certificates are logged when due; 20 and 60 steps are within a round of 8, where workers differ."""
    needs("transformers")
    printed = run(torchrun(EXAMPLES / "huggingface_example.py", "--local-updates", "--certify", "--out", "c"), tmp_path)
    history = json.loads((tmp_path / "c" / "checkpoint-80" / "trainer_state.json").read_text())["log_history"]
    found = [line for line in history if "certificate/grad_norm" in line]
    assert [line["step"] for line in found] == [20, 40, 60, 80]
    losses = [line["certificate/loss"] for line in found]
    assert losses[-1] < 0.7 * losses[0]
    for line in found:
        assert line["certificate/examples"] == 64
        assert line["certificate/lambda_min_upper"] < line["certificate/lambda_max_upper"]
        verdicts = [v for v in Verdict if line[f"certificate/{v.name.lower()}"]]
        assert [line[f"certificate/{v.name.lower()}"] for v in verdicts] == [1.0]
        said = f"step {line['step']}: {verdicts[0]}, gradient norm {line['certificate/grad_norm']:.3e}, lambda_min in ["
        assert sum(text.startswith(said) for text in printed.splitlines()) == 1  # on worker 0 alone


def test_frameworks_log_local_updates(folder: Path) -> None:
    needs("lightning")
    needs("transformers")
    for name in ("lightning", "huggingface"):
        local_example(name, folder)
    with (folder / "l" / "version_0" / "metrics.csv").open() as file:
        lines = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    assert len([row for row in lines if "test_loss" in row]) == 8
    lines = [row for row in lines if "packsaddle/sent" in row]
    assert [row["packsaddle/steps"] for row in lines] == list(range(10, 177, 10))
    history = json.loads((folder / "h" / "checkpoint-80" / "trainer_state.json").read_text())["log_history"]
    history = [line for line in history if "packsaddle/sent" in line]
    assert [line["packsaddle/steps"] for line in history] == list(range(10, 81, 10))
    for row in [*lines, *history]:
        assert row["packsaddle/rounds"] == row["packsaddle/steps"] // 8
        assert row["packsaddle/skipped"] == 0
        assert row["packsaddle/reduction"] > 1
        assert 0 < row["packsaddle/mu"] < 1
        assert "packsaddle/sent_in_step" not in row


@pytest.mark.parametrize("name", ["lightning", "accelerate", "huggingface"])
def test_local_updates_go_on_from_every_workers_state(name: str, tmp_path: Path) -> None:
    """In the script: where DistributedDataParallel exchanges gradients as well, each framework's run is refused."""
    needs(LIBRARIES[name])
    printed = run(torchrun(ROOT / "tests" / "support" / "resuming.py", name, tmp_path, "local"), tmp_path)
    workers = [json.loads(line) for line in printed.splitlines() if line.startswith("{") and '"straight"' in line]
    assert len(workers) == 2
    sent = [worker.pop("bytes") for worker in workers]
    assert all(straight == resumed > 0 for straight, resumed in sent)
    assert workers[0] == workers[1]  # models, and what was evaluated on the way
    found = workers[0]
    assert found["resumed"] == found["straight"]
    assert found["straight"] not in (found["lost"], found["apart until the end"], *found["evaluated"])
    assert found["steps"] == [12, 12]
    assert found["warned"] == 1
    assert found.get("steps of another training", 12) == 12
    assert len(set(found["evaluated"])) == 4  # at steps 3, 6, 9 and 12, by which exchanges have landed
    at_stop = {"lightning": 2, "huggingface": 1}  # Lightning evaluates before it trains
    assert all(saved == found["evaluated"][at_stop[name]] for saved in found.get("saved", []))
    assert len(set(found.get("best", []))) <= 1
    assert len(found["certified"]) == (name == "lightning")
    if name == "lightning":  # a checkpoint that is saved during validation has workers' own parameters too
        (at_stop,) = (tmp_path / "parts").glob("step=6-loss=*.ckpt.packsaddle")
        folders = [at_stop, tmp_path / "parts" / "in_validation.ckpt.packsaddle"]
        own = [[torch.load(f / "lost" / f"worker-{rank}.pt") for f in folders] for rank in range(2)]
        own = [[state["parts"]["model"] for state in worker] for worker in own]
        for one, other in own:
            assert all(torch.equal(one[key], other[key]) for key in one)
        assert not any(torch.equal(own[0][0][key], own[1][0][key]) for key in own[0][0])
    assert ("saved" in found, "best" in found) == (name != "accelerate", name == "huggingface")


def test_a_lora_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """The factors and the error memories are restored: 80 steps and the rest of 120 train on; the base is not sent."""
    needs("trl")
    first = workers_of(LOCAL["trl"][0], tmp_path)
    resumed = workers_of([*LOCAL["trl"][0], "--resume", "--steps", "120"], tmp_path)
    assert {worker["steps"] for worker in resumed} == {"120"}
    assert len({worker["weights"] for worker in resumed}) == 1
    assert float(resumed[0]["last"]) < float(first[0]["last"])
    alone = int(first[0]["alone"].replace(",", ""))  # of 80 steps, 4 bytes a value of the factors
    assert alone < 80 * 4 * 20_000 < 80 * 4 * 107_000  # values in the factors, and in the base


@pytest.mark.nightly
def test_a_loop_of_local_updates_goes_on_from_its_checkpoint(folder: Path, tmp_path: Path) -> None:
    straight = local_example("torchrun", folder)
    script = EXAMPLES / "local_updates.py"
    for steps in (60, 90):
        printed = run(torchrun(script, "--checkpoint", "parts", "--steps", steps), tmp_path)
    resumed = sorted((m.groupdict() for m in LINE.finditer(printed)), key=lambda worker: worker["rank"])
    assert [(w["weights"], w["sent"]) for w in resumed] == [(w["weights"], w["sent"]) for w in straight]


@pytest.mark.parametrize("name", ["lightning", "accelerate", "huggingface"])
def test_a_checkpoint_keeps_every_workers_state(name: str, tmp_path: Path) -> None:
    needs(LIBRARIES[name])
    printed = run(torchrun(ROOT / "tests" / "support" / "resuming.py", name, tmp_path), tmp_path)
    workers = [json.loads(line) for line in printed.splitlines() if line.startswith("{") and '"straight"' in line]
    assert len(workers) == 2
    assert workers[0] == workers[1]
    found = workers[0]
    assert found["resumed"] == found["straight"]
    assert found["steps"] == [12, 12]
    assert found["bytes"][0] == found["bytes"][1]
    assert found["lost"] != found["straight"]
    assert found["warned"] == 1
    assert found.get("steps of another training", 12) == 12
    for rank in (0, 1):
        (kept,) = {p.parents[1].name for p in (tmp_path / "straight").rglob(f"packsaddle*/worker-{rank}.pt")}
        named = {"lightning": r"step=12-loss=.*\.ckpt\.packsaddle", "accelerate": "straight"}
        assert re.fullmatch(named.get(name, "checkpoint-12"), kept)
    if name == "lightning":
        with (tmp_path / "straight" / "log" / "metrics.csv").open() as file:
            assert [row["step"] for row in csv.DictReader(file) if row.get("certificate/loss")] == ["5", "10"]


@pytest.mark.parametrize("name", ["lightning", "accelerate", "huggingface"])
def test_with_one_worker_nothing_is_sent_and_callbacks_say_so(name: str, tmp_path: Path) -> None:
    needs(LIBRARIES[name])
    short = ["--steps", 4] if name == "huggingface" else ["--epochs", 1]
    for local in (False, True):
        what = [f"{name}_example.py", *(["--local-updates"] if local else [])]
        if name == "accelerate" and local:
            what = ["accelerate_local_updates.py"]
        printed = run([forked_python.python(*FRAMEWORKS), EXAMPLES / what[0], *what[1:], *short], tmp_path)
        assert "nothing sent" in printed
        said = "its LocalUpdates send nothing" if local else "packsaddle has nothing to do: there is one worker"
        assert printed.count(said) == (name != "accelerate")
        assert bool(list(tmp_path.rglob("packsaddle/worker-0.pt"))) == (local and name != "accelerate")


def test_a_plain_loop_goes_on_from_its_checkpoint(folder: Path) -> None:
    needs("sklearn")
    example("ddp", folder)
    printed = run(torchrun(EXAMPLES / "ddp.py", "--epochs", 9, "--checkpoint", "saved"), folder)
    workers = [m.groupdict() for m in LINE.finditer(printed)]
    assert [(w["steps"], w["exchanges"]) for w in workers] == [("198", "198")] * 2
    assert all(float(w["first"]) < 1 for w in workers)


def test_the_documented_lines_are_those_of_the_examples() -> None:
    """What the page shows of frameworks needs torchrun, so it is run as a part of the examples."""
    examples = {line.strip() for path in EXAMPLES.glob("*.py") for line in path.read_text().splitlines()}
    for line in list(examples):  # a page imports one name at a time
        module, imports, names = line.partition(" import ")
        examples |= {f"{module}{imports}{name}" for name in names.split(", ") if line.startswith("from packsaddle")}
    examples |= {line.partition("  #")[0] for line in examples} | {
        "",
        "...,",
        "...  # the loop",
        "trainer = Trainer(model=model, args=training, ...)",
    }
    blocks = re.findall(r"```py\n(.*?)```", (ROOT / "docs" / "integrations.md").read_text(), re.DOTALL)
    shown = [line.strip() for block in blocks for line in block.splitlines()]
    assert len(blocks) >= 5
    assert [line for line in shown if line not in examples] == []


# ---- without a framework


def trained(steps: int) -> Any:
    model = DistributedDataParallel(torch.nn.Linear(40, 50))
    hook = register_ddp_hook(model, Compression(TopK(0.1), monitor_every=2))
    for _ in range(steps):
        torch.nn.functional.mse_loss(model(torch.ones(4, 40)), torch.zeros(4, 50)).backward()
    return hook


def measured() -> tuple[dict[str, float], int, int]:
    hook = trained(4)
    last = sum(b.sent for b in hook.ledger.at(3).values())
    return measures(hook), hook.ledger.total.sent, last


def test_measures_are_the_hooks(gloo: Callable[..., list[Any]]) -> None:
    for found, sent, last in gloo(measured, 2):
        alone = 4 * 4 * (40 * 50 + 50)  # steps, bytes of a number, parameters: with two workers each sends all of them
        assert found.pop("reduction") == alone / sent
        assert 0 < found.pop("mu") < 1
        assert found == {
            "steps": 4.0,
            "skipped": 0.0,
            "sent": float(sent),
            "received": float(sent),
            "sent_in_step": float(last),
        }


def test_one_worker_without_a_hook_has_no_state(tmp_path: Path) -> None:
    assert measures(None) == {}
    save_state(None, tmp_path / "none")
    assert not load_state(None, tmp_path / "none")
    assert not (tmp_path / "none").exists()


class Normed(torch.nn.Module):
    """A network with running statistics, a cache of any length, and a parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.map, self.last = torch.nn.BatchNorm1d(40), torch.nn.Linear(40, 50), torch.nn.Linear(50, 2)
        self.last.requires_grad_(False)
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.register_buffer("cache", torch.ones(1 + rank), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.map(self.norm(x)))


def stepping(given: Any = None) -> tuple[Any, Any, Callable[[int], None]]:
    """A framework's model behind local updates, its state, and how it trains."""
    module = Normed()
    model = DistributedDataParallel(module)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    own = attach_local_updates(model, module, given or [optimizer], TopK(0.1), every=3, overlap=1, scaler=scaler)
    assert own is not None
    data = torch.Generator().manual_seed(resolve(None).rank)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(8, 40, generator=data)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()

    return module, own, train


def all_of(module: torch.nn.Module) -> list[torch.Tensor]:
    return [t.detach().clone() for t in module.state_dict().values()]


def local_states(folder: Path) -> dict[str, Any]:
    """What a worker's state keeps and refuses."""
    module, own, train = stepping()
    train(4)
    apart = all_of(module)
    save_state(own, folder / "local")
    save_state(trained(4), folder / "hook")
    kept = set(own.state_dict()["parts"]["model"])
    train(1)
    module_again, again, _ = stepping()
    assert load_state(again, folder / "local")
    loaded = all_of(module_again)
    found = measures(again.local)
    scale = again.state_dict()["scaler"]["scale"]
    for exchange, name in ((again, "hook"), (trained(4), "local")):
        with pytest.raises(ValueError, match=r"was it saved by (a hook|register_ddp_hook)\?"):
            load_state(exchange, folder / name)
    other = torch.nn.Linear(3, 3)
    with pytest.raises(TypeError, match="wraps the model in DistributedDataParallel, got Linear"):
        attach_local_updates(other, other, [torch.optim.SGD(other.parameters())], TopK(0.1))
    half = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    last: list[torch.optim.Optimizer] = [torch.optim.SGD(half[1].parameters(), lr=0.1)]
    with pytest.raises(ValueError, match=r"must have all parameters .*, but 0\.weight, 0\.bias would be trained"):
        attach_local_updates(DistributedDataParallel(half), half, last, TopK(0.1))
    with pytest.raises(ValueError, match="no parameter in common, but SGD and Adam have one"):
        stepping([torch.optim.SGD(other.parameters()), torch.optim.Adam(other.parameters())])
    own.finish()
    return {
        "same": all(torch.equal(a, b) for a, b in zip(apart, loaded, strict=True)),
        "kept": kept,
        "apart": [t.tolist() for t in apart],
        "end": [t.tolist() for t in all_of(module)],
        "measures": found,
        "scale": scale,
    }


def test_a_worker_of_local_updates_has_its_own_state(gloo: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Parameters, running statistics and moments, which are each worker's until the end, when all have one model."""
    first, second = gloo(local_states, 2, tmp_path)
    names = list(Normed().state_dict())
    statistics = {"norm.running_mean", "norm.running_var"}
    for found in (first, second):
        assert found["same"]
        assert found["scale"] == 8.0 * 2**2
        assert found["kept"] == {n for n in names if not n.startswith("last.")}
        assert (found["measures"]["steps"], found["measures"]["rounds"]) == (4.0, 1.0)
        assert found["measures"]["sent"] > 0
    differ = {n for n, a, b in zip(names, first["apart"], second["apart"], strict=True) if a != b}
    assert differ >= statistics | {"map.weight", "map.bias", "norm.weight", "norm.bias"}
    assert first["end"] == second["end"]


def loading(folder: Path) -> dict[str, str]:
    """What is said when every worker's file is there, no file, and one of two."""
    rank, found = resolve(None).rank, {}
    for name in ("all", "one"):
        save_state(trained(2), folder / name)
    if rank == 0:
        (folder / "one" / "packsaddle" / "worker-1.json").unlink()
        (folder / "old").mkdir()
        (folder / "old" / "packsaddle-0.pt").touch()
    resolve(None).all_reduce(torch.zeros(1))
    for name in ("all", "none", "one", "old"):
        hook = trained(3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                outcome = str(load_state(hook, folder / name))
            except ValueError as error:
                outcome = str(error)
        found[name] = f"{outcome}; step {hook.steps}, {len(caught)} warnings"
    return found


def test_a_state_is_loaded_by_all_workers_or_none(gloo: Callable[..., list[Any]], tmp_path: Path) -> None:
    without = "Without these files there is no state of packsaddle's hook: its error memory starts at zero"
    for found in gloo(loading, 2, tmp_path):
        assert found == {
            "all": "True; step 2, 0 warnings",
            "none": "False; step 3, 1 warnings",
            "one": f"{tmp_path / 'one' / 'packsaddle'}: the files of worker 1 of 2 are missing. "
            f"{without}; step 3, 0 warnings",
            "old": f"{tmp_path / 'old'} has packsaddle-RANK.pt of an earlier version of packsaddle; use that version. "
            f"{without}; step 3, 0 warnings",
        }


def test_importing_packsaddle_imports_no_framework() -> None:
    code = (
        "import sys, packsaddle.integrations; "  # and packsaddle.cli, as all forks have
        "print([m for m in "
        "('lightning', 'accelerate', 'transformers', 'tensorboard', 'wandb', 'mlflow') if m in sys.modules])"
    )
    assert run([forked_python.python(), "-c", code], ROOT).strip() == "[]"


# ---- clusters


def test_the_slurm_script_starts_one_run_on_all_nodes(tmp_path: Path) -> None:
    """With scontrol and srun that stand for two nodes on this machine."""
    needs("sklearn")
    programs = {
        "scontrol": 'echo "$@" >> asked; echo localhost; sleep 0.2; echo localhost',  # in two writes
        "srun": 'shift; for node in 1 2; do "$@" & done; wait -n && wait -n',
        "torchrun": f'exec {forked_python.python()} -m torch.distributed.run "$@"',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    script = EXAMPLES / "slurm" / "train.sbatch"
    given = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),  # gives the port
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "INTERFACE": "lo",
    }
    printed = run(["bash", script, "--epochs", 1], tmp_path, **given)
    assert len({m["weights"] for m in LINE.finditer(printed)}) == 1
    assert sorted(m["rank"] for m in LINE.finditer(printed)) == ["0", "1"]
    assert (tmp_path / "asked").read_text() == "show hostnames node[1-2]\n"
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script.read_text(), re.MULTILINE))
    assert options["ntasks-per-node"] == "1"  # torchrun starts a node's workers


def test_the_kubernetes_job_starts_one_run_on_all_pods(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    needs("sklearn")
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes" / "job.yaml").read_text())
    assert (service["kind"], service["spec"]["clusterIP"]) == ("Service", "None")
    assert service["spec"]["publishNotReadyAddresses"] is True  # pods look each other up before they are ready
    assert (job["kind"], job["spec"]["completionMode"]) == ("Job", "Indexed")
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    pod = job["spec"]["template"]["spec"]
    assert (pod["subdomain"], pod["restartPolicy"]) == (service["metadata"]["name"], "Never")
    (container,) = pod["containers"]
    assert container["command"] == ["torchrun"]
    pods = job["spec"]["parallelism"]
    assert pods == job["spec"]["completions"] == 2
    assert f"--nnodes={pods}" in container["args"]
    first = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert f"--master-addr={first}" in container["args"]
    (mount,) = container["volumeMounts"]
    assert mount["name"] == pod["volumes"][0]["name"]

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    here = {first: "localhost", mount["mountPath"]: str(EXAMPLES), "29500": port}
    outputs = [tmp_path / f"{index}.txt" for index in range(pods)]
    workers = []
    for index, output in enumerate(outputs):
        arguments = [a.replace("$(JOB_COMPLETION_INDEX)", str(index)) for a in container["args"]]
        for name, stand_in in here.items():
            arguments = [a.replace(name, stand_in) for a in arguments]
        command = [forked_python.python(), "-m", "torch.distributed.run", *arguments, "--epochs", "1"]
        environment = forked_python.environment(GLOO_SOCKET_IFNAME="lo")
        with output.open("w") as file:
            workers.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))
    assert [worker.wait(timeout=200) for worker in workers] == [0, 0], [o.read_text() for o in outputs]
    said = [m for output in outputs for m in LINE.finditer(output.read_text())]
    assert [m["rank"] for m in said] == ["0", "1"]
    assert said[0]["weights"] == said[1]["weights"]


@pytest.mark.parametrize("kind", ["ModelOutput", "dict", "tuple"])
def test_the_trainers_certificate_takes_any_output_that_the_trainer_takes(kind: str) -> None:
    """`outputs["loss"]` of a mapping, else `outputs[0]`, as `Trainer.compute_loss` does."""
    pytest.importorskip("transformers")
    from transformers.modeling_outputs import SequenceClassifierOutput

    from packsaddle.integrations.huggingface import CertificateCallback

    class Model(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:  # type: ignore[override]
            loss = super().forward(x).square().mean()
            output = SequenceClassifierOutput(loss=loss)
            return {"ModelOutput": output, "dict": {"loss": loss}, "tuple": (loss, x)}[kind]

    class Trainer:
        @staticmethod
        def _prepare_inputs(batch: Any) -> Any:
            return batch

    model, x = Model(3, 3), torch.ones(2, 3)
    callback = CertificateCallback(Trainer(), [{"x": x}], every_n_steps=1)  # type: ignore[arg-type]
    expected = torch.nn.functional.linear(x, model.weight, model.bias).square().mean()
    assert torch.equal(callback._loss(model, {"x": x}), expected)


UNUSED, TOKENS = "ddp_find_unused_parameters", "average_tokens_across_devices"
WAIT: dict[str, tuple[dict[str, Any], int, str]] = {
    "defaults": ({UNUSED: None, TOKENS: True}, 2, f"({UNUSED}=False, {TOKENS}=False), got None and True: "),
    "one of them": ({UNUSED: False, TOKENS: True}, 2, f"({TOKENS}=False), got True: "),
    "older transformers": ({UNUSED: True}, 2, f"({UNUSED}=False), got True: "),
    "older transformers, set": ({UNUSED: False}, 2, ""),
    "one worker": ({UNUSED: None, TOKENS: True}, 1, ""),
}


@pytest.mark.parametrize("name", WAIT)
def test_training_arguments_that_exchange_at_every_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from packsaddle.integrations import huggingface

    given, workers, message = WAIT[name]
    began = MagicMock()
    monkeypatch.setattr(huggingface._Attached, "on_train_begin", began)
    callback = huggingface.LocalUpdatesCallback(MagicMock(), every=8)
    arguments: Any = SimpleNamespace(world_size=workers, **given)
    expected = pytest.raises(ValueError, match=re.escape(f"TrainingArguments{message}")) if message else nullcontext()
    with expected:
        callback.on_train_begin(arguments, MagicMock(), MagicMock())
    assert began.called == (not message)
