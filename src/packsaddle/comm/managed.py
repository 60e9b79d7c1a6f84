"""The group of a torchft Manager, whose workers may join and leave, and `connect`, which creates a Manager.

torchft's lighthouse (its coordination server) tracks the workers. The Manager reconfigures the process group for every
quorum, i.e. set of workers that take part in an exchange. A collective that loses a worker raises an error; the caller
reports it to the Manager, so that `Manager.should_commit` rejects the exchange. The Manager's own collectives are not
used: it has no all-gather, which sparse messages need, and its all-reduce scales and zeroes its input.

A worker may be a site of several processes, which form torch's default process group. Each process has a Manager with
its rank in the site, and a group with its peers, i.e. the processes of the same rank in the other sites.
"""

import ipaddress
import logging
import os
import socket
import urllib.parse
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from packsaddle.comm.communicator import ObjectCollectives
from packsaddle.comm.group import Group, Solo, StagingGroup, TorchGroup
from packsaddle.errors import ConfigError, require
from packsaddle.options.numerals import duration

LIGHTHOUSE = "TORCHFT_LIGHTHOUSE"  # environment variable with the lighthouse's URL, which torchft reads too
_AGAIN = 3.0  # seconds between attempts to reach a lighthouse
_CPU = torch.device("cpu")
_c10d: Any = dist.distributed_c10d  # untyped: its type stubs are incomplete


class ManagedGroup(StagingGroup):
    """The group of the workers in the latest quorum of a torchft Manager. `renew` updates `rank` and `size`.

    The group has no broadcast, since exchanges between workers that may join and leave need none.

    `site` is the group of this worker's processes. Raises MissingExtraError if torchft is not installed, and
    ConfigError if the Manager's number of processes per worker differs from the size of torch's default group.
    """

    may_shrink = True

    def __init__(self, manager: Any) -> None:
        managed: Any = require("torchft.process_group", "torchft", "manager=")
        self.manager, self.rank, self.size = manager, 0, 1
        self._group: Any = managed.ManagedProcessGroup(manager).parent  # the Manager reconfigures it in place
        processes = processes_of(manager)
        self.site = site_group() if processes > 1 else Solo()
        if self.site.size != processes:
            raise ConfigError(f"manager has {processes} processes, and torch's default group has {self.site.size}")

    def renew(self) -> None:
        """Set `rank` to this worker's rank in the latest quorum, and `size` to the number of workers in the quorum.
        Raises ConfigError if this worker is not part of the quorum."""
        rank = self.manager.participating_rank()
        if rank is None:
            raise ConfigError("manager must have world_size_mode=DYNAMIC and use_async_quorum=False: no worker spares")
        self.rank, self.size = rank, self.manager.num_participants()

    def abort(self) -> None:
        """Close the connections of the latest quorum, so that no other worker waits for this one in a collective."""
        self._group.abort()

    def stages(self, device: torch.device) -> bool:
        return device.type != "cpu" and "gloo" in self._group.getBackendName()

    def _all_reduce(self, tensor: Tensor) -> None:
        self._group.allreduce([tensor], _c10d.AllreduceOptions()).wait()

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        self._group.allgather([gathered], [tensor], _c10d.AllgatherOptions()).wait()
        return gathered

    def _all_to_all(self, outgoing: Tensor, lengths: Sequence[int], sizes: Sequence[int]) -> Tensor:
        received = outgoing.new_empty(sum(sizes))
        self._group.alltoall_base(received, outgoing, list(sizes), list(lengths), _c10d.AllToAllOptions()).wait()
        return received


def processes_of(manager: Any) -> int:
    """Return the number of processes of this worker, as set in its torchft Manager. torchft has no public attribute for
    this number, so a private one is read."""
    return int(getattr(manager, "_group_world_size", 1))


def site_group() -> Group:
    """Return a new group of the processes in torch's default group, for tensors on the CPU; collective."""
    return TorchGroup().background(_CPU)


def connect(
    lighthouse: str | None = None,
    *,
    name: str = "worker",
    min_workers: int = 1,
    timeout: float | str = 30.0,
    quorum_timeout: float | str = 600.0,
    connect_timeout: float | str = 10.0,
    hostname: str | None = None,
    bind: str | None = None,
    site: bool = False,
) -> Any:
    """Return a torchft Manager that makes this process a worker of `LocalUpdates(..., workers=)` or, with `site`, one
    of the processes that form a worker.

    Args:
        lighthouse: URL of `torchft_lighthouse`, http://HOST:PORT; by default the value of TORCHFT_LIGHTHOUSE.
        name: this worker's name in torchft's log.
        min_workers: minimum number of workers for an exchange to be applied; identical on all workers.
        timeout: limit in seconds for a collective, or for fetching the state of another worker. This and the next two
            times are numbers of seconds, or text such as "55ms" or "2min".
        quorum_timeout: seconds to wait for other workers to join an exchange.
        connect_timeout: seconds to wait for a connection to the lighthouse.
        hostname: the address by which other workers reach this machine; by default this machine's address in its
            connection to the lighthouse.
        bind: the address at which this worker's servers listen; "::" for all addresses. By default it is this machine's
            address in its connection to the lighthouse, or `hostname` if that address is localhost.
        site: True if all processes in torch's default group are one worker. Each of them calls this function. All sites
            must have the same number of processes.

    States of other workers are loaded with weights_only=True, which allows only tensors and plain types. Raises
    MissingExtraError without torchft, ConfigError if there is no lighthouse, and ValueError for a time that cannot be
    parsed.

    >>> from packsaddle.comm import connect  # doctest: +SKIP
    >>> manager = connect("http://10.0.0.1:29510", min_workers=2)  # doctest: +SKIP
    >>> local = packsaddle.LocalUpdates(optimizer, workers=manager)  # doctest: +SKIP
    """
    timeout, quorum_timeout = duration(timeout, "timeout"), duration(quorum_timeout, "quorum_timeout")
    connect_timeout = duration(connect_timeout, "connect_timeout")
    os.environ.setdefault("RUST_LOG", "warn")  # otherwise torchft's servers log several lines at every exchange
    torchft: Any = require("torchft", "torchft", "elastic training")
    logging.getLogger("torchft.manager").addFilter(_is_useful)
    address = lighthouse or os.environ.get(LIGHTHOUSE, "")
    host, port = _place(address)
    # Unless `hostname` is given, other workers use the address from which this machine connects to the lighthouse.
    route = reach(host, port, connect_timeout)
    here = hostname or route
    listen = bind or (here if ipaddress.ip_address(route).is_loopback else route)
    # For torchft a worker is a replica group of processes, with its own rendezvous store.
    own, store = site_group() if site else Solo(), None
    try:
        store = _bound_store(listen) if own.rank == 0 else None
    except OSError as error:
        raise ConfigError(f"bind must be an address of this machine, got {listen!r} ({error.strerror})") from None
    place_of_store = ObjectCollectives(own, _CPU).send([here, store.port] if store else None, 0)
    # The Manager's server would listen at every address, and torchft has no option for the address. So replace the
    # class of the server while the Manager is made.
    managers: Any = require("torchft.manager", "torchft", "elastic training")
    server, place = managers.ManagerServer, f"[{listen}]" if ":" in listen else listen
    bound = {"bind": f"{place}:{os.environ.get('TORCHFT_MANAGER_PORT', 0)}"}
    try:
        with _replaced(managers, "ManagerServer", lambda **settings: server(**settings | bound)):
            manager = torchft.Manager(
                pg=torchft.ProcessGroupGloo(timeout=timedelta(seconds=timeout)),
                load_state_dict=None,
                state_dict=None,
                min_replica_size=min_workers,
                use_async_quorum=False,
                timeout=timedelta(seconds=timeout),
                quorum_timeout=timedelta(seconds=quorum_timeout),
                connect_timeout=timedelta(seconds=connect_timeout),
                # With init_sync, the processes of a site would receive the parameters of different sites.
                init_sync=not site,
                rank=own.rank,
                world_size=own.size,
                store_addr=place_of_store[0],
                store_port=place_of_store[1],
                lighthouse_addr=address,
                replica_id=name,
                hostname=here,
                checkpoint_transport=_transport(here, listen, timeout),
                # Without retries, a single failed attempt would use up quorum_timeout.
                quorum_retries=max(1, int(quorum_timeout / _AGAIN)),
            )
    except RuntimeError as error:
        raise ConfigError(_absent(address, str(error))) from None
    weakref.finalize(manager, lambda _: None, store)  # keep the store alive as long as the Manager
    return manager


def _bound_store(address: str) -> Any:
    """Return a TCPStore that listens only at `address`, on a free port. The address "::" means all addresses of this
    machine. Raises OSError if the address is not one of this machine."""
    family = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0][0]
    listener = socket.create_server(
        (address, 0), family=family, backlog=1024, dualstack_ipv6=address == "::" and socket.has_dualstack_ipv6()
    )
    # The store also connects to itself as a client, so it needs an address at which this process reaches it. The store
    # closes the listening socket when it is destroyed.
    here, port = "localhost" if address in ("::", "0.0.0.0") else address, listener.getsockname()[1]
    return dist.TCPStore(  # type: ignore[attr-defined]
        here,
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        use_libuv=False,  # a libuv store that is given an open listening socket breaks forks of this process
    )


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _is_useful(record: logging.LogRecord) -> bool:
    """Return False for the warning on NCCL that torchft logs at every quorum if workers use gloo, and True for all
    other log records."""
    return "NCCL flight recorder" not in record.getMessage()


def check_lighthouse(address: str, seconds: float = 10.0) -> None:
    """Raise MissingExtraError if torchft is not installed, and ConfigError if there is no lighthouse at `address`,
    http://HOST:PORT."""
    require("torchft", "torchft", "elastic training")
    reach(*_place(address), seconds)


def reach(host: str, port: int, seconds: float) -> str:
    """Return the address that this machine has in a connection to the lighthouse at `host` and `port`. Raises
    ConfigError if there is no connection after `seconds`."""
    try:
        with socket.create_connection((host, port), timeout=seconds) as connection:
            return str(connection.getsockname()[0]).removeprefix("::ffff:")
    except OSError as error:
        raise ConfigError(_absent(f"http://{host}:{port}", error.strerror or str(error))) from None


def lighthouse_address() -> tuple[str, int] | None:
    """Return the lighthouse's host and port from TORCHFT_LIGHTHOUSE, or None if that environment variable is unset.
    Raises ConfigError if its value is invalid."""
    return _place(os.environ[LIGHTHOUSE]) if os.environ.get(LIGHTHOUSE) else None


def _place(address: str) -> tuple[str, int]:
    """Return host and port of a lighthouse's address. Raises ConfigError unless it has the form http://HOST:PORT."""
    scheme, host, port = "", None, None
    with suppress(ValueError):
        parts = urllib.parse.urlsplit(address)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    if scheme != "http" or not host or not port:
        said = f"got {address!r}" if address else f"and neither it nor {LIGHTHOUSE} is given"
        raise ConfigError(f"the lighthouse must be http://HOST:PORT, {said}")
    return host, port


def _absent(address: str, reason: str) -> str:
    line = " ".join(reason.split())[:120]
    return (
        f"no lighthouse at {address} ({line}): start torchft_lighthouse --min_replicas 1 there, or look for a firewall"
    )


def _transport(host: str, listen: str, seconds: float) -> Any:
    """Return torchft's HTTP transport, which sends states to joining workers. Loading a state from another worker
    accepts only tensors and plain types. Its server listens only at the address `listen`; other workers connect to
    the server at `host`."""
    http: Any = require("torchft.checkpointing.http_transport", "torchft", "elastic training")

    class PlainTransport(http.HTTPTransport):  # type: ignore[misc]
        # torchft's method returns this machine's hostname, which other machines may fail to resolve.
        def address(self) -> str:
            where = f"[{host}]" if ":" in host else host
            return f"http://{where}:{self._server.socket.getsockname()[1]}/checkpoint/"

        # weights_only=True: unpickling a state must not run another worker's code.
        @classmethod
        def _load_from_address(cls, address: str, timeout: timedelta) -> object:
            with (
                http.urllib.request.urlopen(address, timeout=timeout.total_seconds()) as answer,
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("ignore", UserWarning)  # torch warns about non-writable buffers
                return http._streaming_load(answer, weights_only=True)

    class Server(http._IPv6HTTPServer):  # type: ignore[misc]
        address_family = socket.AF_INET6 if ":" in listen else socket.AF_INET

        def __init__(self, _: object, handler: Any) -> None:
            super().__init__((listen, 0), handler)

    with _replaced(http, "_IPv6HTTPServer", Server):
        transport = PlainTransport(timeout=timedelta(seconds=seconds), num_chunks=0)
    transport._server.RequestHandlerClass.log_message = lambda *_: None  # do not log each request on stderr
    return transport
