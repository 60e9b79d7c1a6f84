"""packsaddle doctor: what it finds is what training would use, and what would stop training gives code 1."""

import importlib.metadata
import importlib.util
import json
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commandline import command
from forked_python import environment, torchrun

from packsaddle.cli import doctor
from packsaddle.cli.doctor import Fact, Interface, gloo_listens, interfaces
from packsaddle.comm.failures import WorkerFailedError
from packsaddle.numerics import kernels

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def found(facts: list[Fact] | Iterator[Fact], name: str) -> Fact:
    (fact,) = [fact for fact in facts if fact.name == name]
    return fact


@pytest.mark.process
def test_the_whole_with_two_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("doctor", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    facts = [Fact(**fact) for fact in document["facts"]]
    assert document["ok"]
    assert "2 processes started and exchanged by gloo" in found(facts, "all-reduce").value
    assert torch.__version__ in found(facts, "torch").value
    topics = ["versions", "machine", "devices", "loops", "extras", "network", "exchange"]
    assert [t for t in dict.fromkeys(fact.topic for fact in facts) if t != "environment"] == topics


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Square brackets stay, though rich has a use for them; advice stands under what it is about."""
    made = [
        Fact("extras", "plot", "jinja2 missing", "note", "pip install 'packsaddle[plot]'"),
        Fact("exchange", "gloo", "not in this torch", "problem"),
    ]
    monkeypatch.setattr("packsaddle.cli.doctor.examine", lambda **given: made)
    assert command("doctor", "--no-try") == 1
    shown = capsys.readouterr().out
    assert "> pip install 'packsaddle[plot]'" in shown
    assert "X exchange gloo not in this torch" in " ".join(shown.split())
    assert shown.endswith("Training fails: exchange gloo.\n")
    made.pop()
    assert command("doctor", "--no-try") == 0
    assert capsys.readouterr().out.endswith("No problem found that stops training.\n")


def test_without_trying_no_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "launch", lambda *args: pytest.fail("launched"))
    assert "all-reduce" not in {fact.name for fact in doctor.examine(try_processes=False)}


def test_an_exchange_that_fails_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*args: Any) -> None:
        raise WorkerFailedError("worker 1 failed:\n connection refused")

    monkeypatch.setattr(doctor, "launch", failing)
    fact = doctor.all_reduce()
    assert (fact.verdict, fact.value) == ("problem", "fails: worker 1 failed: connection refused")
    assert command("doctor") == 1
    assert "connection refused" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "launch", lambda *args: (4.0, 2))
    assert doctor.all_reduce().verdict == "problem"


def test_under_torchrun_its_workers_exchange() -> None:
    arguments = torchrun("-m", "packsaddle.cli", "doctor", "--json", workers=3)
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=240, env=environment())
    assert done.returncode == 0, done.stderr
    facts = [Fact(**fact) for fact in json.loads(done.stdout)["facts"]]  # by rank 0 alone
    assert found(facts, "all-reduce").value.startswith("3 processes")
    assert found(facts, "WORLD_SIZE").value == "3"


@pytest.mark.parametrize(
    ("needed", "verdict"), [("torch>=2.9", "ok"), ("torch>=2.99", "problem"), ("nonesuch>=1", "problem")]
)
def test_versions_older_than_the_oldest_tested(
    needed: str, verdict: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By number: torch 2.10 is later than 2.9."""
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [needed])
    fact = found(doctor.versions(), needed.split(">")[0])
    assert fact.verdict == verdict
    assert (f"'{needed}'" in fact.advice) == (verdict == "problem")
    assert command("doctor", "--no-try", "--json") == (verdict == "problem")
    assert json.loads(capsys.readouterr().out)["ok"] == (verdict == "ok")


def test_every_dependency_is_understood_and_every_extra_has_a_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the project states them, and as metadata writes them."""
    optional = {name: p for name, p in PROJECT["optional-dependencies"].items() if name not in ("all", "dev", "docs")}
    lines = PROJECT["dependencies"] + [f"{p}; extra == '{name}'" for name, ps in optional.items() for p in ps]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    assert [fact.name for fact in doctor.versions()][2:] == [p.split(">=")[0] for p in PROJECT["dependencies"]]
    facts = {fact.name: fact for fact in doctor.extras()}
    assert facts.keys() == optional.keys()
    for name, packages in optional.items():
        assert all(package.split(">=")[0] in facts[name].value for package in packages)
        assert name in doctor._PURPOSES


def test_a_missing_extra_comes_with_the_command_that_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ['nonesuch>=1; extra == "plot"'])
    fact = found(doctor.extras(), "plot")
    assert (fact.verdict, fact.advice) == ("note", "pip install 'packsaddle[plot]'")
    assert fact.value.startswith("nonesuch missing, for the picture")

    def unknown(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    # Outside an installation nothing is claimed of requirements.
    monkeypatch.setattr(importlib.metadata, "requires", unknown)
    assert [fact.name for fact in doctor.versions()] == ["packsaddle", "Python"]
    assert list(doctor.extras()) == []


@pytest.fixture
def fresh_kernels() -> Iterator[None]:
    kernels._load.cache_clear()
    yield
    kernels._load.cache_clear()


@pytest.mark.usefixtures("fresh_kernels")
def test_loops_say_why_torch_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(doctor.loops(), "cpu").value.startswith("compiled by numba ")
    assert kernels.compiler("cpu") == "numba"
    kernels._load.cache_clear()
    monkeypatch.setenv("PACKSADDLE_KERNELS", "torch")
    fact = found(doctor.loops(), "cpu")
    assert (fact.value, fact.advice) == ("torch alone: PACKSADDLE_KERNELS=torch asks for torch alone", "")
    kernels._load.cache_clear()
    monkeypatch.delenv("PACKSADDLE_KERNELS")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: real(name, *rest) if name != "numba" else None)
    fact = found(doctor.loops(), "cpu")
    assert (fact.value, fact.advice) == ("torch alone: numba is not installed", "pip install 'packsaddle[fast]'")
    assert kernels.compiler("cpu") == "torch"


@pytest.mark.usefixtures("fresh_kernels")
def test_loops_say_that_the_compiler_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("cannot cache function")

    monkeypatch.setattr("packsaddle.numerics.kernels.importlib.import_module", broken)
    assert found(doctor.loops(), "cpu").value == "torch alone: numba cannot be used: cannot cache function"


def pretend(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch seem to have one accelerator, and backends for all types."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda name: True)


@pytest.mark.parametrize(
    ("kind", "device", "is_staged"),
    [("xpu", "Arc B580, 12 GiB", False), ("mps", "Apple GPU, 12 GiB", True), ("hpu", "not known to packsaddle", True)],
)
def test_other_accelerators(kind: str, device: str, is_staged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(kind, monkeypatch)
    card = SimpleNamespace(name="Arc B580", total_memory=12 * 2**30)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda i: card)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 12 * 2**30)
    first, known = doctor.devices()
    assert (first.name, first.value, known.advice) == (f"{kind}:0", device, "read docs/devices.md")
    assert any(fact.name == kind for fact in doctor.built_with()) == is_staged


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30, major=9, minor=0)
    pretend("cuda", monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    monkeypatch.setattr(doctor, "backends", lambda: {"gloo": True, "nccl": True})
    first, known = doctor.devices()
    assert (first.name, first.value) == ("cuda:0", "NVIDIA H100, 80 GiB, compute capability 9.0")
    assert "no real one" in known.value
    assert found(doctor.built_with(), "nccl").value == "available, used if every worker has a GPU"
    monkeypatch.setattr(doctor, "backends", lambda: {"gloo": False, "nccl": True})
    assert found(doctor.built_with(), "gloo").verdict == "problem"


def test_a_system_without_sysconf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sysconf")
    assert [fact.name for fact in doctor.machine()] == ["cores"]


@pytest.mark.parametrize("driver", [False, True])
@pytest.mark.parametrize("built_for", [None, "12.8"])
def test_a_gpu_that_torch_does_not_see(
    built_for: str | None, driver: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver without a device that torch can use is worth a warning; a machine without either is not."""
    monkeypatch.setattr(doctor, "accelerators", dict)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(doctor, "_DRIVER", tmp_path if driver else tmp_path / "none")
    fact = found(doctor.devices(), "CUDA")
    assert fact.verdict == ("warning" if driver else "note")
    assert ("this torch is built without it" in fact.value) == (built_for is None)
    assert ("install torch with CUDA" in fact.advice) == (driver and built_for is None)


def sysfs(folder: Path, name: str, **files: str) -> None:
    (folder / name).mkdir()
    for file, content in files.items():
        (folder / name / file).write_text(content + "\n")


def test_interfaces_as_linux_describes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "en0"), (3, "veth")])
    monkeypatch.setattr(doctor, "_inet", lambda name: {"lo": ("127.0.0.1",), "en0": ("10.0.0.7",)}.get(name, ()))
    monkeypatch.setattr(doctor, "_inet6", lambda: {"en0": ["fd00::7"]})
    sysfs(tmp_path, "lo", flags="0x9", operstate="unknown")
    sysfs(tmp_path, "en0", flags="0x1003", operstate="up", speed="25000")
    sysfs(tmp_path, "veth", flags="0x1002", operstate="down", speed="-1")
    lo, en0, veth = interfaces(tmp_path)
    assert lo == Interface("lo", ("127.0.0.1",), "unknown", None, True)
    assert en0 == Interface("en0", ("10.0.0.7", "fd00::7"), "up", 25000, False)
    assert veth == Interface("veth", (), "down", None, False)
    monkeypatch.setattr(doctor, "interfaces", lambda: [lo, en0, veth])
    shown = [fact.value for fact in doctor.network() if fact.name != "gloo"]
    assert shown == ["loopback, 127.0.0.1", "up, 10.0.0.7, fd00::7, 25,000 Mbit/s", "down"]


def test_interfaces_of_a_system_that_says_nothing_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As macOS: names alone. Every Linux has a loopback interface in its own tables."""
    (here,) = [i for i in interfaces() if i.name == "lo"]
    assert here.loopback
    assert "127.0.0.1" in here.addresses
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo0"), (2, "en0")])
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(doctor, "_inet6", dict)
    lo, en0 = interfaces(tmp_path / "none")
    assert (lo.loopback, en0.loopback) == (True, False)
    monkeypatch.setattr(doctor, "interfaces", lambda: [en0])
    assert next(iter(doctor.network())).value == "state unknown, address unknown, rate unknown"


HERE = "127.0.0.1"  # an address that can be listened on


@pytest.mark.parametrize(
    "addresses",
    [[HERE], [], ["192.0.2.77"], ["192.0.2.77", HERE]],
    ids=["loopback", "nowhere", "another machine", "another machine, then here"],
)
def test_gloo_listens_where_the_name_of_the_host_leads(addresses: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def lookup(host: str, port: None, type: int) -> list[Any]:
        if not addresses:
            raise socket.gaierror("unknown name")
        return [(socket.AF_INET, type, 0, "", (address, 0)) for address in addresses]

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(doctor, "interfaces", lambda: [Interface("en7", ("10.0.0.7",), "up", None, False)])
    listening = gloo_listens()
    assert (listening.address, listening.reachable, listening.possible) == (HERE, False, True)
    fact = found(doctor.network(), "gloo")
    assert fact.verdict == "warning"
    assert "no other host can reach" in fact.value
    assert "set GLOO_SOCKET_IFNAME=en7 on each" in fact.advice


def test_gloo_listens_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [Interface("lo", (), None, None, True), Interface("en7", ("10.0.0.7",), None, None, False)]
    monkeypatch.setattr(doctor, "interfaces", lambda: known)
    for asked, verdict in (("en7", "ok"), ("lo", "warning"), ("en7,lo", "warning"), ("en8", "problem")):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", asked)
        assert found(doctor.network(), "gloo").verdict == verdict
    assert "names en8, which does not exist" in found(doctor.network(), "gloo").value
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(doctor, "_usable_address", lambda host: "10.0.0.7")
    fact = found(doctor.network(), "gloo")
    assert (fact.verdict, fact.value.partition(": this host")[0]) == ("ok", "listens on 10.0.0.7")


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    facts = list(doctor.variables())
    assert found(facts, "NCCL_DEBUG").value == "INFO"
    assert found(facts, "launcher").verdict == "warning"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "launcher" not in {fact.name for fact in doctor.variables()}


def test_whether_workers_can_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torchft, without a lighthouse that is named, with one that is not there, and with one that answers."""
    monkeypatch.delenv("TORCHFT_LIGHTHOUSE", raising=False)
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    (fact,) = doctor.elastic()
    assert (fact.verdict, fact.advice) == ("note", "pip install 'packsaddle[torchft]'")
    monkeypatch.setattr(doctor, "_version", lambda package: "0.2.0")
    monkeypatch.setitem(sys.modules, "torchft", SimpleNamespace())
    (fact,) = doctor.elastic()
    assert (fact.value, fact.verdict) == ("torchft 0.2.0, but no lighthouse is set", "note")
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        monkeypatch.setenv("TORCHFT_LIGHTHOUSE", f"http://localhost:{listener.getsockname()[1]}")
        (fact,) = doctor.elastic()
        assert fact.value.startswith("fails: no lighthouse at http://localhost:")
        assert fact.verdict == "warning"
        listener.listen()
        (fact,) = doctor.elastic()
        assert fact.value.endswith("is reachable from 127.0.0.1")
        assert fact.verdict == "ok"
