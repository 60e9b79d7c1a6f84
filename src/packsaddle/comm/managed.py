"""The group of a torchft Manager, whose workers come and go, and the Manager of this process.

torchft's lighthouse says who is there, and its Manager reconfigures the process group at every quorum. A collective
in which a worker is lost raises here, as in any group, and whoever called it reports that to the Manager, whose vote
then discards what was tried. The Manager's own all-reduce would not do: it knows no all-gather, which sparse messages
need, and it scales and zeroes what it is given.
"""

import logging
import os
import socket
import urllib.parse
import warnings
import weakref
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from packsaddle.comm.group import Group
from packsaddle.errors import ConfigError, require

LIGHTHOUSE = "TORCHFT_LIGHTHOUSE"  # the environment variable, which torchft reads too
_dist: Any = dist  # whose types lack what is used
_AGAIN = 3.0  # seconds after which a lighthouse that does not answer is asked again
_c10d: Any = dist.distributed_c10d


class ManagedGroup(Group):
    """The group of the workers in a Manager's latest quorum. `rank` and `size` are those of the last `renew`.

    Raises MissingExtraError without torchft.

    >>> group = ManagedGroup(manager)  # doctest: +SKIP
    >>> group.renew()  # doctest: +SKIP
    >>> group.rank, group.size  # doctest: +SKIP
    """

    def __init__(self, manager: Any) -> None:
        managed: Any = require("torchft.process_group", "torchft", "manager=")
        self.manager, self.rank, self.size = manager, 0, 1
        self._group: Any = managed.ManagedProcessGroup(manager).parent  # the Manager reconfigures it in place

    def renew(self) -> None:
        """Take rank and size of the latest quorum. Raises ConfigError if the Manager leaves this worker out of it."""
        rank = self.manager.participating_rank()
        if rank is None:
            raise ConfigError("manager must have world_size_mode=DYNAMIC and use_async_quorum=False: no worker spares")
        self.rank, self.size = rank, self.manager.num_participants()

    def abort(self) -> None:
        """Break the connections of the latest quorum, so that no other worker waits for this one in a collective."""
        self._group.abort()

    def all_reduce(self, tensor: Tensor) -> None:
        self._group.allreduce([tensor], _c10d.AllreduceOptions()).wait()

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        self._group.allgather([gathered], [tensor], _c10d.AllgatherOptions()).wait()
        return gathered

    def all_to_all(self, outgoing: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        received = outgoing[0].new_empty(sum(sizes))
        options, lengths = _c10d.AllToAllOptions(), [len(t) for t in outgoing]
        self._group.alltoall_base(received, torch.cat(list(outgoing)), list(sizes), lengths, options).wait()
        return list(torch.split(received, list(sizes)))

    def broadcast(self, tensor: Tensor) -> None:
        self._group.broadcast_one(tensor, 0).wait()


def connect(
    lighthouse: str | None = None,
    *,
    name: str = "worker",
    min_workers: int = 1,
    timeout: float = 30.0,
    quorum_timeout: float = 600.0,
    connect_timeout: float = 10.0,
    hostname: str | None = None,
) -> Any:
    """Return a torchft Manager that makes this process one worker of `LocalUpdates(..., workers=)`.

    Args:
        lighthouse: URL of `torchft_lighthouse`, http://HOST:PORT. None: the variable TORCHFT_LIGHTHOUSE.
        name: this worker's name in torchft's log.
        min_workers: fewest workers of a committed round; identical on all workers.
        timeout: seconds that a collective may take, or fetching the state of another worker.
        quorum_timeout: seconds to wait for other workers to join a round.
        connect_timeout: seconds to wait for a connection to the lighthouse.
        hostname: this machine's address for other workers. None: its address in the connection to the lighthouse.

    States of other workers are loaded with weights_only=True: tensors and plain types. Raises MissingExtraError without
    torchft, and ConfigError if there is no lighthouse.

    >>> from packsaddle.comm import connect  # doctest: +SKIP
    >>> manager = connect("http://10.0.0.1:29510", min_workers=2)  # doctest: +SKIP
    >>> local = packsaddle.LocalUpdates(optimizer, workers=manager)  # doctest: +SKIP
    """
    os.environ.setdefault("RUST_LOG", "warn")  # torchft's servers say several lines in every round
    torchft: Any = require("torchft", "torchft", "elastic training")
    logging.getLogger("torchft.manager").addFilter(_is_of_use)
    address = lighthouse or os.environ.get(LIGHTHOUSE, "")
    host, port = _place(address)
    # Other workers reach this machine by the interface that leads to the lighthouse.
    here = hostname or reach(host, port, connect_timeout)
    # To torchft a worker is a replica group of one process, with its own store for the others to meet at.
    store: Any = _dist.TCPStore(here, 0, is_master=True, wait_for_workers=False)
    try:
        manager = torchft.Manager(
            pg=torchft.ProcessGroupGloo(timeout=timedelta(seconds=timeout)),
            load_state_dict=None,
            state_dict=None,
            min_replica_size=min_workers,
            use_async_quorum=False,
            timeout=timedelta(seconds=timeout),
            quorum_timeout=timedelta(seconds=quorum_timeout),
            connect_timeout=timedelta(seconds=connect_timeout),
            rank=0,
            world_size=1,
            store_addr=here,
            store_port=store.port,
            lighthouse_addr=address,
            replica_id=name,
            hostname=here,
            checkpoint_transport=_transport(here, timeout),
            quorum_retries=max(1, int(quorum_timeout / _AGAIN)),  # else one failure costs all of quorum_timeout
        )
    except RuntimeError as error:
        raise ConfigError(_absent(address, str(error))) from None
    weakref.finalize(manager, lambda _: None, store)  # other workers meet there as long as the Manager lives
    return manager


def _is_of_use(record: logging.LogRecord) -> bool:
    """Leave out of torchft's log what it says at every quorum of workers without NCCL."""
    return "NCCL flight recorder" not in record.getMessage()


def check_lighthouse(address: str, seconds: float = 10.0) -> None:
    """Raise MissingExtraError without torchft, and ConfigError if there is no lighthouse at http://HOST:PORT."""
    require("torchft", "torchft", "elastic training")
    reach(*_place(address), seconds)


def reach(host: str, port: int, seconds: float) -> str:
    """Return the address of this machine from which a lighthouse is reached. Raises ConfigError if it is not there."""
    try:
        with socket.create_connection((host, port), timeout=seconds) as connection:
            return str(connection.getsockname()[0]).removeprefix("::ffff:")
    except OSError as error:
        raise ConfigError(_absent(f"http://{host}:{port}", error.strerror or str(error))) from None


def lighthouse_place() -> tuple[str, int] | None:
    """Return host and port of the lighthouse that the environment names, None if it names none. Raises ConfigError."""
    return _place(os.environ[LIGHTHOUSE]) if os.environ.get(LIGHTHOUSE) else None


def _place(address: str) -> tuple[str, int]:
    """Return host and port of http://HOST:PORT."""
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


def _transport(host: str, seconds: float) -> Any:
    """Return torchft's transport of states to joining workers, at the address `host` and without pickled objects."""
    http: Any = require("torchft.checkpointing.http_transport", "torchft", "elastic training")

    class PlainTransport(http.HTTPTransport):  # type: ignore[misc]
        # torchft's has this machine's hostname, which other machines may fail to resolve.
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
                warnings.simplefilter("ignore", UserWarning)  # torch's, of buffers that cannot be written
                return http._streaming_load(answer, weights_only=True)

    transport = PlainTransport(timeout=timedelta(seconds=seconds), num_chunks=0)
    transport._server.RequestHandlerClass.log_message = lambda *_: None  # a line on stderr for each newcomer
    return transport
