"""The command `packsaddle doctor`: a report of the hardware and software that training can use on this machine."""

import importlib
import importlib.util
import ipaddress
import json as json_format
import logging
import os
import platform
import re
import socket
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from rich.table import Table
from rich.text import Text

import packsaddle
from packsaddle.cli.console import is_first, print_table
from packsaddle.comm.devices import accelerator, accelerators, direct_backend
from packsaddle.comm.group import backends
from packsaddle.comm.launching import launch, process_group, under_launcher
from packsaddle.comm.managed import LIGHTHOUSE, lighthouse_address, reach
from packsaddle.messages import one_line
from packsaddle.numerics import kernels

_SIOCGIFADDR = 0x8915  # Linux's ioctl request for the IPv4 address of a network interface
_IFF_LOOPBACK = 0x8


@dataclass(frozen=True)
class Interface:
    """A network interface of this machine, as reported by the operating system."""

    name: str
    addresses: tuple[str, ...]  # IPv4 before IPv6 addresses; empty: none are reported
    state: str | None  # state of the interface, Linux's operstate: "up", "down", "unknown", ...; None: not reported
    mbit: int | None  # link speed in Mbit/s; None for most virtual links
    loopback: bool


@dataclass(frozen=True)
class Listening:
    """The address on which gloo listens for other workers, and the reason why gloo chooses it."""

    address: str  # IP address, or the network interfaces named by GLOO_SOCKET_IFNAME if it is set
    why: str
    reachable: bool  # True if other hosts can connect
    possible: bool = True  # False if gloo fails to start


def interfaces(sysfs: Path = Path("/sys/class/net")) -> list[Interface]:
    """Return the network interfaces of this machine. On systems other than Linux only their names are known. `sysfs` is
    the folder in which Linux describes each interface."""
    inet6 = _inet6()
    found = []
    for _, name in socket.if_nameindex():
        flags = _read(sysfs / name / "flags")
        loopback = bool(int(flags, 16) & _IFF_LOOPBACK) if flags else name.startswith("lo")
        speed = _read(sysfs / name / "speed")
        # Linux reports a speed of -1 if it is unknown.
        mbit = int(speed) if speed and int(speed) > 0 else None
        addresses = (*_inet(name), *inet6.get(name, ()))
        found.append(Interface(name, addresses, _read(sysfs / name / "operstate"), mbit, loopback))
    return found


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:  # on systems other than Linux, and for interfaces without a speed
        return None


def _inet(name: str) -> tuple[str, ...]:
    if sys.platform != "linux":
        return ()
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return ()
    return (socket.inet_ntoa(answer[20:24]),)


def _inet6() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (_read(Path("/proc/net/if_inet6")) or "").splitlines():
        digits, _, _, _, _, name = line.split()
        address = ipaddress.IPv6Address(bytes.fromhex(digits))
        if not address.is_link_local:
            found.setdefault(name, []).append(str(address))
    return found


def gloo_listens() -> Listening:
    """Return the address on which gloo listens, with the reason.

    If GLOO_SOCKET_IFNAME is set, the address is given as the names of network interfaces in that variable. Otherwise it
    is the address to which this host's name resolves. If that address does not belong to this machine, gloo listens on
    the loopback address.
    """
    if asked := os.environ.get("GLOO_SOCKET_IFNAME"):
        known = {i.name: i for i in interfaces()}
        for name in asked.split(","):
            if name not in known:
                return Listening(asked, f"GLOO_SOCKET_IFNAME names {name}, which does not exist", False, False)
        reachable = not any(known[name].loopback for name in asked.split(","))
        return Listening(asked, "GLOO_SOCKET_IFNAME selects it", reachable)
    host = socket.gethostname()
    address = _usable_address(host)
    if address is None:
        return Listening("127.0.0.1", f"this host's name, {host}, resolves to no address of this machine", False)
    reachable = not ipaddress.ip_address(address.partition("%")[0]).is_loopback
    return Listening(address, f"this host's name, {host}, resolves to it", reachable)


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


Verdict = Literal["ok", "note", "warning", "problem"]
Topic = Literal["versions", "machine", "devices", "loops", "extras", "network", "environment", "exchange"]

_DRIVER = Path("/proc/driver/nvidia/version")
_READ = "read docs/devices.md"
_PATIENCE = timedelta(seconds=60)  # timeout for two processes to connect, which usually takes about a second
_MODULES = {"scikit-learn": "sklearn", "mlflow-skinny": "mlflow"}  # import names that differ from the package's name
_PURPOSES = {
    "plot": "the picture of certify-script",
    "lab": "figures, pages and demo of python -m lab, in a clone",
    "digits": "the digits on which examples train",
    "vision": "MNIST, CIFAR-10 and image folders of python -m lab",
    "fast": "compiled loops on the CPU",
    "lightning": "packsaddle.integrations.lightning",
    "hf": "packsaddle.integrations.huggingface",
    "torchft": "LocalUpdates(..., workers=): workers that join and leave",
    "track": "python -m lab run --track",
}
_OURS = ("dev", "docs")  # extras for developers of packsaddle
_VARIABLES = {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"}
_VARIABLES |= {"TORCHFT_LIGHTHOUSE", "TORCHFT_TIMEOUT_SEC", "TORCHFT_QUORUM_TIMEOUT_SEC"}
_VARIABLES |= {"GLOO_SOCKET_IFNAME", "PACKSADDLE_KERNELS", "CUDA_VISIBLE_DEVICES", "TORCH_DISTRIBUTED_DEBUG"}


@dataclass(frozen=True)
class Fact:
    """One finding of `packsaddle doctor`. The verdict of a finding is "ok", "note" (the feature is absent or
    unused), "warning" (some uses may fail) or "problem" (training fails)."""

    topic: Topic
    name: str
    value: str
    verdict: Verdict = "ok"
    advice: str = ""


def examine(*, try_processes: bool = True, only: Sequence[Topic] = ()) -> list[Fact]:
    """Run the checks of the topics in `only`, or of all topics if `only` is empty, and return their findings. With
    `try_processes`, the checks of topic "exchange" include an all-reduce between two new processes or, under torchrun,
    between its workers."""
    found: dict[Topic, list[Callable[[], Iterable[Fact]]]] = {
        "versions": [versions],
        "machine": [machine],
        "devices": [devices],
        "loops": [loops],
        "extras": [extras],
        "network": [network],
        "environment": [variables],
        "exchange": [built_with, elastic, *([lambda: [all_reduce()]] if try_processes else [])],
    }
    return [fact for topic, parts in found.items() if topic in (only or found) for part in parts for fact in part()]


def versions() -> Iterator[Fact]:
    """Yield a finding with the version of packsaddle, one with that of Python, and one for each required package. The
    finding for a package also has the oldest version that packsaddle supports."""
    yield Fact("versions", "packsaddle", f"{packsaddle.__version__}, {Path(packsaddle.__file__).parent}")
    yield Fact("versions", "Python", f"{platform.python_version()}, {sys.executable}, {platform.platform()}")
    for package, least, extra in _requirements():
        if extra is None:
            found = _version(package) or "missing"
            if found == "missing" or _numbers(found) < _numbers(least):
                advice = f"pip install --upgrade '{package}>={least}'"
                yield Fact("versions", package, f"{found}, needs {least} or newer", "problem", advice)
            else:
                yield Fact("versions", package, f"{found} ({least} or newer)")


def _requirements() -> list[tuple[str, str, str | None]]:
    try:
        lines = importlib.metadata.requires("packsaddle") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    pattern = re.compile(r"([\w.-]+)>=([\w.]+)(?:; extra == ['\"](\w+)['\"])?")
    return [match.groups() for line in lines if (match := pattern.fullmatch(line))]  # type: ignore[misc]


def _version(package: str) -> str | None:
    if importlib.util.find_spec(_MODULES.get(package, package)) is None:
        return None
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version.partition("+")[0])))


def machine() -> Iterator[Fact]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Fact("machine", "cores", f"{cores}, torch uses {torch.get_num_threads()} of them")

    # Windows has no sysconf, and only Linux reports the available memory and the cgroup's limit.
    if not hasattr(os, "sysconf"):
        return
    text = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    if available := re.search(r"MemAvailable: +(\d+)", _read(Path("/proc/meminfo")) or ""):
        text += f", {int(available[1]) / 2**20:.1f} GiB available"
    limit = _read(Path("/sys/fs/cgroup/memory.max")) or ""
    if limit.isdecimal():
        text += f", limited to {int(limit) / 2**30:.1f} GiB"
    yield Fact("machine", "memory", text)


def devices() -> Iterator[Fact]:
    """Yield findings on the GPUs that torch can use, with a description of each, or the reason why there are none."""
    if found := accelerators():
        for name, text in found.items():
            yield Fact("devices", name, text)
        yield Fact("devices", "experience", "tried on a pretended device alone, on no real one", "note", _READ)
        return
    driver = _DRIVER.exists()
    if torch.version.cuda is None:
        advice = "an NVIDIA driver is installed: install torch with CUDA to use the GPU" if driver else ""
        yield Fact("devices", "CUDA", "this torch is built without it", "warning" if driver else "note", advice)
    else:
        why = "although an NVIDIA driver is installed" if driver else "and no NVIDIA driver is installed"
        value = f"torch is built for CUDA {torch.version.cuda}, but sees no device, {why}"
        yield Fact("devices", "CUDA", value, "warning" if driver else "note")
    yield Fact("devices", "cpu", f"{platform.processor() or platform.machine()}: training runs here")


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
        yield Fact("exchange", kind, "its tensors are exchanged by gloo, through host memory", "note", _READ)


_REACH = 3.0  # timeout for connecting to a lighthouse (torchft's coordination server), in seconds


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


def extras() -> Iterator[Fact]:
    """Yield a finding for each extra, i.e. group of optional dependencies: its packages, their versions and their
    purpose. If a package is missing, the finding's advice is the command that installs it."""
    needed: dict[str, list[str]] = {}
    for package, _, extra in _requirements():
        if extra not in (None, "all", *_OURS):
            needed.setdefault(extra or "", []).append(package)
    for extra, packages in needed.items():
        shown = ", ".join(f"{package} {_version(package) or 'missing'}" for package in packages)
        missing = any(_version(package) is None for package in packages)
        purpose = f", for {_PURPOSES[extra]}" if extra in _PURPOSES else ""
        advice = f"pip install 'packsaddle[{extra}]'" if missing else ""
        yield Fact("extras", extra, shown + purpose, "note" if missing else "ok", advice)


def network() -> Iterator[Fact]:
    found = interfaces()
    for i in found:
        addresses = ", ".join(i.addresses) or "address unknown"
        if i.state == "down":
            yield Fact("network", i.name, "down", "note")
        elif i.loopback:
            yield Fact("network", i.name, f"loopback, {addresses}")
        else:
            rate = "rate unknown" if i.mbit is None else f"{i.mbit:,} Mbit/s"
            yield Fact("network", i.name, f"{i.state or 'state unknown'}, {addresses}, {rate}")

    # Report the address on which gloo listens. If other hosts cannot reach it, suggest another network interface.
    gloo = gloo_listens()
    usable = (i.name for i in found if not i.loopback and i.state != "down" and i.addresses)
    names = next(usable, "NAME")
    if not gloo.possible:
        advice = f"set GLOO_SOCKET_IFNAME={names}, or unset it"
        yield Fact("network", "gloo", f"fails: {gloo.why}", "problem", advice)
    elif gloo.reachable:
        yield Fact("network", "gloo", f"listens on {gloo.address}: {gloo.why}")
    else:
        advice = f"for workers on several hosts set GLOO_SOCKET_IFNAME={names} on each (with its own interface's name)"
        value = f"listens on {gloo.address}, which no other host can reach: {gloo.why}"
        yield Fact("network", "gloo", value, "warning", advice)


def variables() -> Iterator[Fact]:
    for name in sorted(os.environ):
        if name in _VARIABLES or name.startswith("NCCL_"):
            yield Fact("environment", name, os.environ[name])
    if ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ):
        value = "one of RANK and WORLD_SIZE is set without the other, so no launcher is assumed"
        yield Fact("environment", "launcher", value, "warning", "unset it, or start packsaddle under torchrun")


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


def doctor(only: tuple[Topic, ...] = (), no_try: bool = False, json: bool = False) -> None:
    """Check this machine's hardware, software and network.

    Checks versions, cores, GPUs, compiled loops, optional packages, network interfaces, the address on which gloo
    listens, and environment variables, and suggests how to fix problems. Then two processes run an all-reduce. Under
    torchrun, the workers on all hosts run it instead. The exit code is 1 if training would fail, else 0.

    Examples:
        packsaddle doctor
        packsaddle doctor --only network exchange
        packsaddle doctor --json --no-try
        torchrun --nnodes 2 --nproc-per-node 1 -m packsaddle.cli doctor

    Args:
        only: The topics to check; by default all. Processes are started only for "exchange".
        no_try: Start no processes.
        json: Print one JSON document.
    """
    facts = examine(try_processes=not no_try, only=only)
    problems = [fact for fact in facts if fact.verdict == "problem"]
    if is_first() and json:
        print(json_format.dumps({"ok": not problems, "facts": [asdict(fact) for fact in facts]}, indent=2))
    elif is_first():
        table = Table(box=None, show_header=False, padding=(0, 1), caption=_LEGEND, caption_justify="left")
        before = ""
        for fact in facts:
            # Make the cell a Text, so that rich does not interpret [plot] as markup.
            found = Text(f"{fact.value}\n> {fact.advice}" if fact.advice else fact.value)
            table.add_row(_MARKS[fact.verdict], "" if fact.topic == before else fact.topic, fact.name, found)
            before = fact.topic
        print_table(table)
        stopped = ", ".join(f"{fact.topic} {fact.name}" for fact in problems)
        print(f"Training fails: {stopped}." if stopped else "No problem found that stops training.")
    if problems:
        sys.exit(1)
