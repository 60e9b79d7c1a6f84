"""The torchft Manager's part of a round: the Manager determines the set of workers (the quorum), and collects the
workers' errors and votes."""

from contextlib import suppress
from datetime import timedelta

from packsaddle.comm.failures import PeerLostError
from packsaddle.comm.managed import ManagedGroup
from packsaddle.errors import ConfigError
from packsaddle.local.elastic.sigterm import Sigterm
from packsaddle.local.elastic.site import Site


class RoundFailedError(RuntimeError):
    """Raised if an attempt at a round was not committed; `ElasticWorkers.round` then repeats the round. The message is
    empty if this worker's attempt succeeded, but the vote of all workers was against the round."""


class Quorum:
    """The quorum of each round, and the vote of its workers.

    Args:
        group: the group of the workers, which the Manager reconfigures at each quorum.
        site: the processes of this worker, each of which has a Manager of its own.
        sigterm: the handler of SIGTERM, which may interrupt the wait for a quorum.
    """

    def __init__(self, group: ManagedGroup, site: Site, sigterm: Sigterm) -> None:
        self._manager, self._group, self._site, self._sigterm = group.manager, group, site, sigterm

    def form(self, *, is_last: bool) -> None:
        """Wait until torchft has determined the set of workers. If this worker is behind the other workers, it receives
        the state of another worker within this call. If this worker leaves after the round (`is_last`), the call waits
        at most until the end of the grace period.

        Raises RoundFailedError if torchft has formed no quorum in time, or has raised another error.
        """
        timeout = timedelta(seconds=self._sigterm.left) if is_last else None
        try:
            with self._site.fails_together(), self._sigterm.waiting():
                self._manager.start_quorum(timeout=timeout)
        except (ConfigError, PeerLostError):
            self.abort()
            raise
        except Exception as error:  # torchft raises errors of several types
            # Clear the future of the failed quorum, since torchft 0.2.0 would raise its error again at every later
            # quorum.
            self._manager._quorum_future = None
            raise RoundFailedError(str(error)) from error

    def check(self) -> None:
        """Raise RuntimeError if torchft has reported an error since the quorum was formed; collective over the
        processes of this worker."""
        with self._site.fails_together():
            if (failure := self._manager.errored()) is not None:
                raise RuntimeError(str(failure))

    def report(self, error: Exception) -> None:
        """Report an error of this worker to torchft, so that this worker votes against the round. Also close the
        connections, so that no other worker waits for this one."""
        self._manager.report_error(error)
        self.abort()

    def abort(self) -> None:
        """Close the connections to the other workers, so that none waits for this one in a collective."""
        with suppress(RuntimeError):
            self._group.abort()

    def vote(self, reason: str | None) -> None:
        """Vote on the round with all workers. Raises RoundFailedError if the round is not committed. `reason` is the
        error of this worker's attempt, which becomes the message of the RoundFailedError; None: the attempt
        succeeded."""
        if not self._manager.should_commit():
            raise RoundFailedError("" if reason is None else reason or str(self._manager.errored()))

    def mark_as_behind(self) -> None:
        """Mark this worker as behind, so that it receives the state of another worker at the next quorum."""
        self._manager.load_state_dict({"step": 0, "batches_committed": 0})
