"""This machine's network interfaces, and which of them gloo would listen on. What the system does not tell is None."""

import ipaddress
import os
import socket
import struct
import sys
from dataclasses import dataclass
from pathlib import Path

_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface
_IFF_LOOPBACK = 0x8


@dataclass(frozen=True)
class Interface:
    """One network interface."""

    name: str
    addresses: tuple[str, ...]  # IPv4 before IPv6; empty if it has none, or if the system does not tell
    state: str | None  # "up", "down" or what else the system calls it
    mbit: int | None  # Mbit/s; virtual links mostly have none
    loopback: bool


@dataclass(frozen=True)
class Listening:
    """Where gloo listens for the other workers, and why there."""

    address: str  # of a host, or the names of interfaces
    why: str
    reachable: bool  # from other hosts
    possible: bool = True  # False: gloo fails


def interfaces(sysfs: Path = Path("/sys/class/net")) -> list[Interface]:
    """Return the interfaces of this machine; Linux tells all of each, others at least the names."""
    inet6 = _inet6()
    found = []
    for _, name in socket.if_nameindex():
        flags = _read(sysfs / name / "flags")
        loopback = bool(int(flags, 16) & _IFF_LOOPBACK) if flags else name.startswith("lo")
        speed = _read(sysfs / name / "speed")
        mbit = int(speed) if speed and int(speed) > 0 else None  # -1: unknown
        addresses = (*_inet(name), *inet6.get(name, ()))
        found.append(Interface(name, addresses, _read(sysfs / name / "operstate"), mbit, loopback))
    return found


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:  # not Linux; or a link that has no speed
        return None


def _inet(name: str) -> tuple[str, ...]:
    """Its first IPv4 address."""
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
    """The IPv6 addresses of each interface, but for those of the link alone."""
    found: dict[str, list[str]] = {}
    for line in (_read(Path("/proc/net/if_inet6")) or "").splitlines():
        digits, _, _, _, _, name = line.split()
        address = ipaddress.IPv6Address(bytes.fromhex(digits))
        if not address.is_link_local:
            found.setdefault(name, []).append(str(address))
    return found


def gloo_listens() -> Listening:
    """Return where torch's gloo listens: on GLOO_SOCKET_IFNAME, else where this host's name leads, else on loopback."""
    if asked := os.environ.get("GLOO_SOCKET_IFNAME"):
        known = {i.name: i for i in interfaces()}
        for name in asked.split(","):
            if name not in known:
                return Listening(asked, f"GLOO_SOCKET_IFNAME asks for {name}, which is not there", False, False)
        reachable = not any(known[name].loopback for name in asked.split(","))
        return Listening(asked, "GLOO_SOCKET_IFNAME asks for it", reachable)
    host = socket.gethostname()
    address = _usable_address(host)
    if address is None:
        return Listening("127.0.0.1", f"this host's name, {host}, leads to no address of its own", False)
    reachable = not ipaddress.ip_address(address.partition("%")[0]).is_loopback
    return Listening(address, f"this host's name, {host}, leads there", reachable)


def _usable_address(host: str) -> str | None:
    """The first address of a name that can be listened on, as gloo takes it."""
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
