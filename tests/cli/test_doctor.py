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
from packsaddle.cli.doctor import Fact
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
    assert [*dict.fromkeys(fact.topic for fact in facts)] == ["versions", "devices", "loops", "network", "exchange"]


def test_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Square brackets stay, though rich has a use for them; advice stands under what it is about."""
    made = [
        Fact("loops", "cpu", "torch alone: numba is not installed", "note", "pip install 'packsaddle[fast]'"),
        Fact("exchange", "gloo", "not in this torch", "problem"),
    ]
    monkeypatch.setattr("packsaddle.cli.doctor.examine", lambda **given: made)
    assert command("doctor", "--no-try") == 1
    shown = capsys.readouterr().out
    assert "> pip install 'packsaddle[fast]'" in shown
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


def test_every_dependency_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the project states them, and as metadata writes them; outside an installation nothing is claimed."""
    optional = [f"{p}; extra == '{name}'" for name, ps in PROJECT["optional-dependencies"].items() for p in ps]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: PROJECT["dependencies"] + optional)
    assert [fact.name for fact in doctor.versions()][2:] == [p.split(">=")[0] for p in PROJECT["dependencies"]]

    def unknown(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", unknown)
    assert [fact.name for fact in doctor.versions()] == ["packsaddle", "Python"]


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
    (fact,) = doctor.devices()
    assert (fact.name, fact.value) == (f"{kind}:0", device)
    assert any(fact.name == kind for fact in doctor.built_with()) == is_staged


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30, major=9, minor=0)
    pretend("cuda", monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: card)
    monkeypatch.setattr(doctor, "backends", lambda: {"gloo": True, "nccl": True})
    (fact,) = doctor.devices()
    assert (fact.name, fact.value) == ("cuda:0", "NVIDIA H100, 80 GiB, compute capability 9.0")
    assert found(doctor.built_with(), "nccl").value == "available, used if every worker has a GPU"
    monkeypatch.setattr(doctor, "backends", lambda: {"gloo": False, "nccl": True})
    assert found(doctor.built_with(), "gloo").verdict == "problem"


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
    for interfaces, advice in (
        ({"en7": "10.0.0.7"}, "set GLOO_SOCKET_IFNAME on each, here to en7 (10.0.0.7)"),
        ({"en7": "10.0.0.7", "wg0": "fd00::7"}, "on each, here to one of en7 (10.0.0.7), wg0 (fd00::7)"),
        ({}, ", after connecting this host to a network"),
    ):
        monkeypatch.setattr(doctor, "reachable_interfaces", lambda interfaces=interfaces: interfaces)
        fact = found(doctor.network(), "gloo")
        assert fact.verdict == "warning"
        assert f"listens on {HERE}, which no other host can reach" in fact.value
        assert fact.advice.endswith(advice)


def test_only_interfaces_with_an_address_that_others_reach_are_proposed(hosts_here: None) -> None:
    """In a network of its own: not loopback, a dummy, an interface that is down, or one with a link-local address."""
    make = """
        ip link set lo up
        ip link add dummy0 type dummy && ip addr add 10.6.0.1/24 dev dummy0 && ip link set dummy0 up
        ip link add down0 type veth peer name down1 && ip addr add 10.7.0.1/24 dev down0
        ip link add up0 type veth peer name up1 && ip addr add fd00::1/64 dev up0 && ip addr add 10.8.0.1/24 dev up0
        ip link set up0 up && ip link set up1 up
        ip link add six0 type veth peer name six1 && ip addr add fd01::1/64 dev six0
        ip link set six0 up && ip link set six1 up
        "$0" -c "from packsaddle.cli.doctor import reachable_interfaces as found; print(found())"
    """
    done = subprocess.run(["unshare", "-n", "sh", "-ec", make, sys.executable], capture_output=True, text=True)
    assert done.stdout == "{'up0': '10.8.0.1', 'six0': 'fd01::1'}\n", done.stderr


def test_gloo_listens_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "en7")])
    monkeypatch.setattr(doctor, "reachable_interfaces", lambda: {"en7": "10.0.0.7"})
    for asked, verdict in (("en7", "ok"), ("lo", "warning"), ("en7,lo", "warning"), ("en8", "problem")):
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", asked)
        assert found(doctor.network(), "gloo").verdict == verdict
    assert "names en8, which does not exist" in found(doctor.network(), "gloo").value
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(doctor, "_usable_address", lambda host: "10.0.0.7")
    fact = found(doctor.network(), "gloo")
    assert (fact.verdict, fact.value.partition(": this host")[0]) == ("ok", "listens on 10.0.0.7")


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
