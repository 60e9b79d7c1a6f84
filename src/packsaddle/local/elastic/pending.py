"""This worker's pending updates, which the anchor does not include: they are in its error memories and parameters, in
its memory file (see `memory_file`), and in an exchange in doubt.

An exchange is in doubt while another worker may have committed it and this worker cannot determine that. A round ends
with a confirmation, i.e. an all-gather after the exchange, and a vote of the workers (see `workers`). The exchange is
in doubt from the start of this worker's confirmation until the vote or, if the confirmation fails, until the next
quorum, i.e. until the workers of the next round are determined.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from packsaddle.errors import ConfigError
from packsaddle.local.elastic.membership import Membership
from packsaddle.local.elastic.memory_file import MemoryFile, OwnFile
from packsaddle.local.fragment import Fragment, by_parameter
from packsaddle.numerics.devices import widened

_log = logging.getLogger("packsaddle")


class PendingUpdates:
    """The updates of this worker that the anchor (the parameters last agreed on) does not include, and their copy in
    the memory file.

    Args:
        own: this worker's membership, with its fragments.
        path: the memory file, which is locked until `end`; None: there is no file.
    """

    def __init__(self, own: Membership, path: Path | None) -> None:
        self._own, self._fragments = own, own.fragments
        self.file = None if path is None else OwnFile(path)
        self.in_doubt: Sequence[Fragment] = ()  # fragments whose exchanges are in doubt; empty: none

    # Methods for the exchanges of the round in progress.

    def close_exchanges(self) -> bool:
        """Commit the exchanges in doubt; return True if all of them are applied, and False if one is rejected."""
        parts, self.in_doubt = self.in_doubt, ()
        # Close every exchange before calling `all`, since `all` with a generator would stop at the first rejected
        # exchange.
        applied = [part.current.close() for part in parts if part.current is not None]
        return all(applied)

    def roll_back(self) -> None:
        """Roll back the exchanges of the round in progress, if there is one. No exchange is in doubt then."""
        self.in_doubt = ()
        for part in self._fragments:
            part.roll_back()

    def norm_after(self) -> float:
        """Return the norm that this worker's error memory, over all fragments, will have if the current round is
        committed. If there is no current round, it is the norm of the current error memory."""
        pairs = [(part, part.current) for part in self._fragments]
        errors = [r.exchanged.v if r and r.exchanged and r.share else f.feedback.memory.vector for f, r in pairs]
        return math.sqrt(sum(map(energy, errors)))

    def exist(self) -> bool:
        """Return True if this worker has joined, and has updates that a round would send. Updates of frozen parameters
        are not sent, so they do not count."""
        pending = [part.unapplied() for part in self._fragments]
        for part, vector in zip(self._fragments, pending, strict=True):
            for name, view in part.by_name(vector).items():
                view.mul_(name not in part.frozen_next)
        return self._own.has_joined and any(bool(vector.any()) for vector in pending)

    # Methods for the memory file.

    @property
    def are_kept(self) -> bool:
        """True if this worker's file contains its error memory as it was after the last round that was committed with
        its update."""
        return self.file is not None and self.file.holds(self._own.account.included)

    def save(self, exchanged: Sequence[Fragment] = ()) -> bool:
        """Write the pending updates to this worker's memory file. Returns True if the file contains them, and False if
        there is no file or if writing fails.

        `exchanged` are the fragments of the round in progress; empty: there is none. In a round, the updates that will
        be pending if the round is committed are written too.
        """
        if self.file is None:
            return False
        if self.in_doubt:  # the file was written before the confirmation, with the updates for both outcomes
            return self.are_kept
        own, now = self._own, [part.unapplied() for part in self._fragments]
        memory = MemoryFile(own.roster.run, own.worker, own.account.included, by_parameter(self._fragments, now))
        if exchanged:
            pairs = zip(self._fragments, now, strict=True)
            later = by_parameter(self._fragments, [p.unapplied_after() if p in exchanged else e for p, e in pairs])
            memory = replace(memory, next_attempt=own.account.attempts, next_error=later)
        return self.file.save(memory)

    def claim(self) -> None:
        """Continue as the worker to which the memory file belongs: use the name, the number of attempts and the error
        memory of that worker, and move the parameters to the start point of this error memory. If the updates in the
        file were sent after it was written, they are not loaded. If the file does not exist or is of another run, or if
        a checkpoint has restored this worker's error memory, the worker keeps its name and its error memory, and writes
        the file. No-op if no memory file is set.

        Each process of a site has a file. A process whose file is missing or outdated has lost its error memory, unless
        each process has the whole model. In that case all processes continue with the error memory of the first process
        whose file is up to date.
        """
        if self.file is None:
            return
        own, site = self._own, self._own.site
        shapes = {place.name: place.parameter.shape for part in self._fragments for place in part.places}
        found, lost = self.file.claim(shapes, own.roster, own.worker, own.account.included)
        of_site = site.gather(None if found is None else [found.worker, lost])
        names = sorted({of[0] for of in of_site if of is not None})
        if len(names) > 1:
            raise ConfigError(f"memory files of a site must be of one worker, and are of {', '.join(map(hex, names))}")
        if names:
            # Use the memory in this process's file, or that of another process that has the whole model.
            own.worker = names[0]
            error = {} if found is None else found.error
            if found is None and own.worker in own.roster.members:
                lost = own.roster.members[own.worker].norm
            if site.has_replicas:
                losses = [math.inf if of is None else of[1] for of in of_site]
                source = losses.index(min(losses))
                error, lost = site.send(dict(error), source), losses[source]
            own.account.attempts = own.account.included = own.roster.taken.get(own.worker, 0)
            own.account.found_lost += lost
            for part in self._fragments:
                for place, view in part.named(part.feedback.memory.vector):
                    if error:
                        view.copy_(error[place.name])
                part.anchor.move_to_start()
            own.account.norm = self.norm_after()
            where, norm = self.file.path, own.account.norm
            _log.info("worker %x continues with its memory in %s, of norm %.3g", own.worker, where, norm)
        if not self.are_kept:
            # Write the file now, since this worker reports in the next round if its file is up to date.
            self.save()

    def remove_file(self) -> None:
        """Delete the memory file, if there is one. Call after its updates have been sent."""
        if self.file is not None:
            self.file.remove()

    def end(self) -> None:
        """Roll back the round in progress, if there is one, and unlock the memory file, if there is one."""
        self.roll_back()
        if self.file is not None:
            self.file.close()


def energy(vector: Tensor) -> float:
    """Return the squared norm of a vector, computed in at least float32."""
    return float(widened(vector).square().sum())
