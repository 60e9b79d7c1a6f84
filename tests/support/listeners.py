"""The addresses at which processes of this machine listen, as read from Linux's /proc."""

import ipaddress
import os
import re
from pathlib import Path


def listeners(pid: int) -> set[tuple[str, int]]:
    """Return address and port of each TCP socket on which a process listens."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(link))
        except FileNotFoundError:  # the descriptor was closed in the meantime
            continue
        if found:
            inodes.add(found[1])
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()
    ]
    return {_place(fields[1]) for fields in lines if fields[3] == "0A" and fields[9] in inodes}


def _place(text: str) -> tuple[str, int]:
    """Convert an address of /proc/net/tcp: words of four bytes, each in the order of the machine, and a port."""
    address, port = text.split(":")
    words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
    return str(ipaddress.ip_address(b"".join(words))), int(port, 16)


def are_local(found: set[tuple[str, int]]) -> bool:
    """Return True if there are sockets and none can be reached from another machine."""
    addresses = [ipaddress.ip_address(address.removeprefix("::ffff:")) for address, _ in found]
    return bool(addresses) and all(address.is_loopback for address in addresses)
