"""The world that a launcher sets up in environment variables: whether there is one, and what is wrong with it."""

import os
import socket

from packsaddle.schema import ConfigError
from packsaddle.wording import shown


def under_launcher() -> bool:
    """Whether torchrun (or any launcher that sets RANK and WORLD_SIZE) started this process.

    Raises ConfigError if the launcher's variables do not make sense.
    """
    there = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if len(there) == 1:
        raise ConfigError(
            f"{there[0]} is set, but of RANK and WORLD_SIZE a launcher sets both, and without one neither"
        )
    if not there:
        return False
    size = _variable("WORLD_SIZE", 1, 2**31 - 1)
    _variable("RANK", 0, size - 1)
    _variable("LOCAL_WORLD_SIZE", 1, size, default=1)
    _variable("LOCAL_RANK", 0, size - 1, default=0)
    _variable("MASTER_PORT", 1, 65535, default=1)
    return True


def _variable(name: str, least: int, most: int, default: int | None = None) -> int:
    text = os.environ.get(name) if default is None else os.environ.get(name, str(default))
    if text is None or not text.strip().isascii() or not text.strip().isdecimal() or not least <= int(text) <= most:
        raise ConfigError(f"{name}, which the launcher sets, must be from {least} to {most}, got {shown(text)}")
    return int(text)


def check_interface() -> None:
    """Raise ConfigError if gloo is told to listen on an interface that this machine does not have."""
    named = os.environ.get("GLOO_SOCKET_IFNAME", "")
    there = [name for _, name in socket.if_nameindex()] if hasattr(socket, "if_nameindex") else []
    missing = [name for name in named.split(",") if name and there and name not in there]
    if missing:
        raise ConfigError(f"GLOO_SOCKET_IFNAME names {missing[0]}, and this machine has {', '.join(there)}")


def not_joined(error: Exception) -> str:
    """What to say and do when the world could not be joined; torch's own first line, which has no more, at its end."""
    place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if "EADDRINUSE" in str(error) or "already in use" in str(error):
        advice = f"{place} is in use; name another port with --master-port (MASTER_PORT)"
    elif "environment variable" in reason:
        advice = "start it with torchrun, which sets the variables"
    elif "joined" in reason or "imed out" in reason:
        advice = f"not every worker came to {place} in time; look whether all were started, and whether they reach it"
    else:
        advice = f"look at MASTER_ADDR and MASTER_PORT ({place}) and GLOO_SOCKET_IFNAME"
    return f"the workers could not meet: {advice} ({reason})"
