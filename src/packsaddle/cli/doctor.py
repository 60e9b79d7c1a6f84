"""The command `packsaddle doctor`: a report of the hardware and software that training can use on this machine."""

import ctypes
import importlib
import importlib.metadata
import ipaddress
import json as json_format
import logging
import os
import platform
import re
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from rich.table import Table
from rich.text import Text

import packsaddle
from packsaddle.cli.console import is_first, print_table
from packsaddle.comm.group import backends
from packsaddle.comm.launching import direct_backend, launch, process_group, under_launcher
from packsaddle.comm.managed import LIGHTHOUSE, lighthouse_address, reach
from packsaddle.messages import one_line
from packsaddle.numerics import kernels
from packsaddle.numerics.devices import accelerator, accelerators

Verdict = Literal["ok", "note", "warning", "problem"]

_DRIVER = Path("/proc/driver/nvidia/version")
_PATIENCE = timedelta(seconds=60)  # timeout for two processes to connect, which usually takes about a second
_REACH = 3.0  # timeout for connecting to a lighthouse (torchft's coordination server), in seconds


@dataclass(frozen=True)
class Fact:
    """One finding of `packsaddle doctor`. The verdict of a finding is "ok", "note" (the feature is absent or
    unused), "warning" (some uses may fail) or "problem" (training fails)."""

    topic: str
    name: str
    value: str
    verdict: Verdict = "ok"
    advice: str = ""


def examine(*, try_processes: bool = True) -> list[Fact]:
    """Run all checks, and return their findings. With `try_processes`, they include an all-reduce between two new
    processes or, under torchrun, between its workers."""
    found = [*versions(), *devices(), *loops(), *network(), *built_with(), *elastic()]
    return [*found, all_reduce()] if try_processes else found


def versions() -> Iterator[Fact]:
    """Yield a finding with the version of packsaddle, one with that of Python, and one for each required package. The
    finding for a package also has the oldest version that packsaddle supports."""
    yield Fact("versions", "packsaddle", f"{packsaddle.__version__}, {Path(packsaddle.__file__).parent}")
    yield Fact("versions", "Python", f"{platform.python_version()}, {sys.executable}, {platform.platform()}")
    for package, least in _requirements():
        found = _version(package) or "missing"
        if found == "missing" or _numbers(found) < _numbers(least):
            advice = f"pip install --upgrade '{package}>={least}'"
            yield Fact("versions", package, f"{found}, needs {least} or newer", "problem", advice)
        else:
            yield Fact("versions", package, f"{found} ({least} or newer)")


def _requirements() -> list[tuple[str, str]]:
    """Return each required package with its oldest supported version. Optional packages are left out."""
    try:
        lines = importlib.metadata.requires("packsaddle") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    matches = (re.fullmatch(r"([\w.-]+)>=([\w.]+)", line) for line in lines)
    return [(match[1], match[2]) for match in matches if match]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])))


def devices() -> Iterator[Fact]:
    """Yield findings on the GPUs that torch can use, with a description of each, or the reason why there are none."""
    if found := accelerators():
        for name, text in found.items():
            yield Fact("devices", name, text)
        return
    driver = _DRIVER.exists()
    if torch.version.cuda is None:
        advice = "an NVIDIA driver is installed: install torch with CUDA to use the GPU" if driver else ""
        yield Fact("devices", "CUDA", "this torch is built without it", "warning" if driver else "note", advice)
    else:
        why = "although an NVIDIA driver is installed" if driver else "and no NVIDIA driver is installed"
        value = f"torch is built for CUDA {torch.version.cuda}, but sees no device, {why}"
        yield Fact("devices", "CUDA", value, "warning" if driver else "note")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Fact("devices", "cpu", f"training runs here; torch uses {torch.get_num_threads()} of {cores} cores")


def loops() -> Iterator[Fact]:
    """Yield a finding on the compiler of packsaddle's inner loops on the CPU. Without a compiler, torch computes the
    same results more slowly. On other devices torch computes them in any case."""
    with warnings.catch_warnings():
        # Ignore packsaddle's own warning that loops are not compiled, which this finding replaces.
        warnings.simplefilter("ignore", kernels.SlowKernelsWarning)
        obstacle = kernels.obstacle()
    if obstacle:
        advice = "pip install 'packsaddle[fast]'" if obstacle == kernels.NO_NUMBA else ""
        yield Fact("loops", "cpu", f"torch alone: {obstacle}", "note", advice)
    else:
        yield Fact("loops", "cpu", f"compiled by numba {_version('numba')}")


def network() -> Iterator[Fact]:
    """Yield findings on the network interfaces, and on the address at which gloo listens for other workers.

    If GLOO_SOCKET_IFNAME is set, gloo listens at the interfaces that this variable names. Otherwise it listens at the
    address to which this host's name resolves or, if that address does not belong to this machine, at the loopback
    address.
    """
    names = [name for _, name in socket.if_nameindex()]
    others = reachable_interfaces()
    yield Fact("network", "interfaces", ", ".join(names))

    # Find the address, and the reason why gloo uses it.
    asked, host = os.environ.get("GLOO_SOCKET_IFNAME"), socket.gethostname()
    if asked:
        if missing := [name for name in asked.split(",") if name not in names]:
            value = f"fails: GLOO_SOCKET_IFNAME names {missing[0]}, which does not exist"
            yield Fact("network", "gloo", value, "problem", "set GLOO_SOCKET_IFNAME to an interface, or unset it")
            return
        address, why = asked, "GLOO_SOCKET_IFNAME selects it"
        is_reachable = all(name in others for name in asked.split(","))
    elif found := _usable_address(host):
        address, why = found, f"this host's name, {host}, resolves to it"
        is_reachable = not ipaddress.ip_address(address.partition("%")[0]).is_loopback
    else:
        address, why = "127.0.0.1", f"this host's name, {host}, resolves to no address of this machine"
        is_reachable = False

    # If other hosts cannot reach the address, suggest another network interface.
    if is_reachable:
        yield Fact("network", "gloo", f"listens on {address}: {why}")
    else:
        found = ", ".join(f"{name} ({address})" for name, address in others.items())
        choice = "here to one of " if len(others) > 1 else "here to "
        where = choice + found if others else "after connecting this host to a network"
        advice = f"for workers on several hosts set GLOO_SOCKET_IFNAME on each, {where}"
        value = f"listens on {address}, which no other host can reach: {why}"
        yield Fact("network", "gloo", value, "warning", advice)


class _Interface(ctypes.Structure):
    """The first fields of C's `struct ifaddrs`, which are the same on Linux and macOS: one address of an interface."""


_Interface._fields_ = [
    ("next", ctypes.POINTER(_Interface)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]
_UP, _LOOPBACK, _POINT_TO_POINT, _RUNNING, _NO_ARP = 0x1, 0x8, 0x10, 0x40, 0x80  # flags of interfaces


def reachable_interfaces() -> dict[str, str]:
    """Return an address of each network interface at which other hosts may reach this one, by name.

    The interface is up and connected, is not the loopback interface or a dummy, and has an address that is not
    link-local. IPv4 addresses are preferred.
    """
    c, first = ctypes.CDLL(None), ctypes.POINTER(_Interface)()
    if c.getifaddrs(ctypes.byref(first)):
        return {}
    found: dict[str, str] = {}
    entry = first
    while entry:
        one = entry.contents
        is_connected = one.flags & _UP and one.flags & _RUNNING and not one.flags & _LOOPBACK
        is_dummy = one.flags & _NO_ARP and not one.flags & _POINT_TO_POINT  # a tunnel is point to point
        address = _address_at(one.address) if is_connected and not is_dummy else None
        if address is not None and not address.is_link_local:
            name = one.name.decode()
            if name not in found or (address.version == 4 and ":" in found[name]):
                found[name] = str(address)
        entry = one.next
    c.freeifaddrs(first)
    return found


def _address_at(pointer: int | None) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return the address in C's `struct sockaddr` at a pointer. Returns None for other families, or a null pointer."""
    if pointer is None:
        return None
    # Linux stores the family in two bytes, and macOS a length and the family in one byte each.
    family = ctypes.string_at(pointer, 2)
    kind = family[1] if sys.platform == "darwin" else int.from_bytes(family, sys.byteorder)
    if kind == socket.AF_INET:
        return ipaddress.IPv4Address(ctypes.string_at(pointer + 4, 4))
    return ipaddress.IPv6Address(ctypes.string_at(pointer + 8, 16)) if kind == socket.AF_INET6 else None


def _usable_address(host: str) -> str | None:
    """Return the first of a host name's addresses to which a socket can be bound, or None if there is no such
    address. Gloo selects the address on which it listens in the same way."""
    try:
        candidates = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return None
    for family, kind, protocol, _, where in candidates:
        try:
            with socket.socket(family, kind, protocol) as trial:
                trial.bind(where)
        except OSError:
            continue
        return str(where[0])
    return None


def built_with() -> Iterator[Fact]:
    """Yield findings on the backends of torch.distributed (gloo, nccl) that this build of torch has."""
    found = backends()
    if found["gloo"]:
        yield Fact("exchange", "gloo", "available")
    else:
        yield Fact("exchange", "gloo", "not in this torch", "problem", "install torch from PyPI")
    if found["nccl"]:
        used = "used if every worker has a GPU" if accelerator() == "cuda" else "not used: there is no GPU"
        yield Fact("exchange", "nccl", f"available, {used}")
    else:
        yield Fact("exchange", "nccl", "not in this build of torch: workers with GPUs would use gloo", "note")
    if (kind := accelerator()) and direct_backend(1) is None:
        yield Fact(
            "exchange", kind, "its tensors are exchanged by gloo, through host memory", "note", "read docs/devices.md"
        )


def elastic() -> Iterator[Fact]:
    """Yield a finding on the requirements of workers that join and leave during training. These are the package torchft
    and a reachable lighthouse (torchft's coordination server), whose address is set in the environment."""
    if _version("torchft") is None:
        advice = "pip install 'packsaddle[torchft]'"
        yield Fact("exchange", "elastic", "not available: torchft is not installed", "note", advice)
        return

    # Report a failing import of torchft or an unreachable lighthouse as a warning.
    try:
        importlib.import_module("torchft")
        place = lighthouse_address()
        if place is None:
            advice = f"export {LIGHTHOUSE}=http://HOST:29510, where torchft_lighthouse runs"
            value = f"torchft {_version('torchft')}, but no lighthouse is set"
            yield Fact("exchange", "elastic", value, "note", advice)
            return
        here = reach(*place, _REACH)
    except Exception as error:  # any failure is a finding
        yield Fact("exchange", "elastic", f"fails: {one_line(str(error))}", "warning")
        return
    yield Fact("exchange", "elastic", f"the lighthouse at {place[0]}:{place[1]} is reachable from {here}")


def all_reduce() -> Fact:
    """Test gloo by an all-reduce of one number, between torchrun's workers or between two new processes. Return the
    finding."""
    start = time.perf_counter()
    # Disable logging: the launcher would log the workers' tracebacks, which the returned finding summarizes.
    logging.disable()
    try:
        total, workers = sum_over_workers() if under_launcher() else launch(sum_over_workers, (), 2)
    except Exception as error:  # a failure of any type is a finding
        reason = " ".join(str(error).split()) or type(error).__name__
        return Fact("exchange", "all-reduce", f"fails: {reason}", "problem", "see the rows of topic network")
    finally:
        logging.disable(logging.NOTSET)
    seconds = time.perf_counter() - start
    if total != workers * (workers + 1) / 2:
        return Fact("exchange", "all-reduce", f"wrong result {total} over {workers} processes", "problem")
    return Fact("exchange", "all-reduce", f"{workers} processes started and exchanged by gloo in {seconds:.1f} s")


def sum_over_workers() -> tuple[float, int]:
    """Sum the numbers 1, 2, ..., W over W workers by an all-reduce on CPUs. Returns the sum and W. Call it in each
    process of a launcher."""
    with process_group(_PATIENCE) as group:
        total = torch.tensor([group.rank + 1.0])
        group.all_reduce(total)
        return float(total), group.size


_MARKS = {"ok": "", "note": "-", "warning": "!", "problem": "X"}
_LEGEND = "- absent or unused   ! may fail in some uses   X training fails"


def doctor(no_try: bool = False, json: bool = False) -> None:
    """Check this machine's hardware, software and network.

    Checks versions, GPUs, compiled loops, and the address on which gloo listens, and suggests how to fix problems. Then
    two processes run an all-reduce. Under torchrun, the workers on all hosts run it instead. The exit code is 1 if
    training would fail, else 0.

    Examples:
        packsaddle doctor
        packsaddle doctor --json --no-try
        torchrun --nnodes 2 --nproc-per-node 1 -m packsaddle.cli doctor

    Args:
        no_try: Start no processes.
        json: Print one JSON document.
    """
    facts = examine(try_processes=not no_try)
    problems = [fact for fact in facts if fact.verdict == "problem"]
    if is_first() and json:
        print(json_format.dumps({"ok": not problems, "facts": [asdict(fact) for fact in facts]}, indent=2))
    elif is_first():
        table = Table(box=None, show_header=False, padding=(0, 1), caption=_LEGEND, caption_justify="left")
        before = ""
        for fact in facts:
            # Make the cell a Text, so that rich does not interpret [fast] as markup.
            found = Text(f"{fact.value}\n> {fact.advice}" if fact.advice else fact.value)
            table.add_row(_MARKS[fact.verdict], "" if fact.topic == before else fact.topic, fact.name, found)
            before = fact.topic
        print_table(table)
        stopped = ", ".join(f"{fact.topic} {fact.name}" for fact in problems)
        print(f"Training fails: {stopped}." if stopped else "No problem found that stops training.")
    if problems:
        sys.exit(1)
