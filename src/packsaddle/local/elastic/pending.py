"""This worker's pending updates: in its error memories and parameters, in its memory file, and in an exchange in doubt.

An exchange is in doubt while the other workers may have committed it, and this worker cannot know. That is the time
from this worker's confirmation to the vote or, if the confirmation failed, to the next quorum.
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
    """The updates of this worker that the anchor does not include, and their copy in the memory file.

    Args:
        own: this worker's membership, with its fragments.
        path: the memory file, which is locked until `end`; None: there is no file.
    """

    def __init__(self, own: Membership, path: Path | None) -> None:
        self._own, self._fragments = own, own.fragments
        self.file = None if path is None else OwnFile(path)
        self.in_doubt: Sequence[Fragment] = ()  # fragments of a round that other workers may have committed

    # Methods for the exchanges of the round in progress.

    def close_exchanges(self) -> bool:
        """Commit the exchanges in doubt; return True if all of them are applied, and False if one is rejected."""
        parts, self.in_doubt = self.in_doubt, ()
        # Close every exchange first, since `all` would stop at the first rejected one.
        applied = [part.current.close() for part in parts if part.current is not None]
        return all(applied)

    def roll_back(self) -> None:
        """Roll back the exchanges of the round in progress."""
        self.in_doubt = ()
        for part in self._fragments:
            part.roll_back()

    def norm_after(self) -> float:
        """Return the norm that this worker's error memory will have if the current round is committed."""
        pairs = [(part, part.current) for part in self._fragments]
        errors = [r.exchanged.v if r and r.exchanged and r.share else f.feedback.memory.vector for f, r in pairs]
        return math.sqrt(sum(map(energy, errors)))

    def exist(self) -> bool:
        """Return True if this worker has updates that a round would send. Updates of frozen parameters are not sent, so
        they do not count."""
        pending = [part.unapplied() for part in self._fragments]
        for part, vector in zip(self._fragments, pending, strict=True):
            for name, view in part.by_name(vector).items():
                view.mul_(name not in part.frozen_next)
        return self._own.has_joined and any(bool(vector.any()) for vector in pending)

    # Methods for the memory file.

    @property
    def are_kept(self) -> bool:
        """True if this worker's file contains its error memory after its last round."""
        return self.file is not None and self.file.holds(self._own.account.included)

    def save(self, exchanged: Sequence[Fragment] = ()) -> bool:
        """Write the pending updates to this worker's memory file; return False if there is no file, or if writing
        fails.

        `exchanged` are the fragments of the round in progress. If there are any, the updates that will be pending once
        the round is committed are written too.
        """
        if self.file is None:
            return False
        if self.in_doubt:  # nothing has changed since the file was written
            return self.are_kept
        own, now = self._own, [part.unapplied() for part in self._fragments]
        memory = MemoryFile(own.roster.run, own.worker, own.account.included, by_parameter(self._fragments, now))
        if exchanged:
            pairs = zip(self._fragments, now, strict=True)
            later = by_parameter(self._fragments, [p.unapplied_after() if p in exchanged else e for p, e in pairs])
            memory = replace(memory, next_attempt=own.account.attempts, next_error=later)
        return self.file.save(memory)

    def claim(self) -> None:
        """Continue as the worker to which the memory file belongs: use its name, attempts and error memory, and move
        the parameters to its start point. Updates in the file that were sent after it was written are not loaded. No-op
        without a file.

        The processes of a site have a file each. A process without an up-to-date file has lost its memory, unless each
        process has the whole model: then all continue with the memory of the first process that has it.
        """
        if self.file is None:
            return
        own, site = self._own, self._own.site
        shapes = {place.name: place.parameter.shape for part in self._fragments for place in part.places}
        found, lost = self.file.claim(shapes, own.roster)
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
            # Save before the next round, in which this worker reports that its file is up to date.
            self.save()

    def remove_file(self) -> None:
        """Delete the file, whose updates have been sent."""
        if self.file is not None:
            self.file.remove()

    def end(self) -> None:
        """Roll back the round in progress, and unlock the file."""
        self.roll_back()
        if self.file is not None:
            self.file.close()


def energy(vector: Tensor) -> float:
    """Return the squared norm of a vector, computed in at least float32."""
    return float(widened(vector).square().sum())
