"""The start of a round: each worker sends a `Hello` about itself, and all workers check that they have the same
arguments, anchors and compressors."""

import logging
from collections.abc import Callable, Sequence
from itertools import zip_longest

import torch

from packsaddle.comm.communicator import Communicator, as_text, hash_of
from packsaddle.errors import ConfigError
from packsaddle.feedback.checks import fingerprint
from packsaddle.local.elastic.membership import Membership
from packsaddle.local.elastic.quorum import Quorum, RoundFailedError
from packsaddle.local.elastic.roster import Hello, most

_log = logging.getLogger("packsaddle")


class Greeting:
    """Exchanges the workers' `Hello` messages. From the hashes in these messages, it checks that the workers'
    arguments, their anchors (the parameters last agreed on) and the kind of their compressed messages are equal.

    Args:
        own: this worker's membership.
        quorum: forms the set of workers. A worker whose anchor differs from the anchor of most workers receives another
            worker's state at the next quorum.
        channel: the communicator of the workers.
    """

    def __init__(self, own: Membership, quorum: Quorum, channel: Communicator) -> None:
        self._own, self._quorum, self._channel = own, quorum, channel
        # The device of small messages, such as `Hello`: the CPU if the group copies all messages to the CPU anyway, and
        # otherwise the device of the anchor.
        device = own.fragments[0].anchor.flat.device
        self.device = torch.device("cpu") if channel.group.stages(device) else device
        # A function that returns, as text, the arguments of this worker that must be equal on all workers.
        self.arguments: Callable[[], str] = str
        self._arguments_hash = 0  # hash of the text of `arguments` when the worker joined

    def exchange(self, *, dense: bool, seconds: float) -> list[Hello]:
        """Exchange the Hello messages, and check that they match (see `_check`); collective. Returns the messages by
        rank.

        Args:
            dense: True if this worker requests a round in which all workers send all pending updates.
            seconds: this process's mean time of an inner step, in seconds; 0: unknown.
        """
        if not self._own.has_joined:
            self._arguments_hash = hash_of(self.arguments())
        mine = self._hello(dense=dense, seconds=seconds)
        with self._own.site.fails_together():
            gathered = self._channel.gather({"hello": mine.packed(self.device)}, fixed_size=True, purpose="members")
        hellos = [Hello.unpacked(parts["hello"]) for parts in gathered]
        self._check(hellos, mine)
        return hellos

    def _hello(self, *, dense: bool, seconds: float) -> Hello:
        own, account, every = self._own, self._own.account, self._own.due.options.compression.compare_every
        compared = every > 0 and own.rounds % every == 0
        # A worker that has not joined has weight 0: it only receives the mean. A worker that has not stepped since its
        # last round has weight 0 too, although it may have an error memory, or unsent updates of fragments that were
        # not in that round. In a round that sends all pending updates, such a worker has its last weight instead
        # (`idle_weight`), also if it has no pending updates and sends zeros.
        weight = own.weight() if own.has_joined else 0.0
        idle_weight = account.last_weight if own.has_joined and account.counted else 0.0
        checksum = int(torch.stack([fingerprint(p.anchor.flat) for p in own.fragments]).sum()) if compared else 0
        anchor, nanoseconds, pending = own.site.totals(
            *(checksum, round(1e9 * seconds), not weight and own.has_pending())
        )
        return Hello(
            worker=own.worker,
            arguments=self._arguments_hash,
            message=hash_of(self._message()),
            history=own.roster.history,
            anchor=anchor,
            run=own.roster.run,
            attempt=account.attempts,
            steps=account.since,
            dense=int(dense),
            has_pending=int(pending > 0),
            frozen=hash_of(as_text({"frozen": [part.frozen_next for part in own.fragments]})),
            weight=weight,
            idle_weight=idle_weight,
            seconds=nanoseconds / 1e9,
        )

    def _message(self) -> str:
        """Return a text that describes the message that this worker sends in the next compressed round. It contains
        packsaddle's version, the compressor, the number of coordinates d and the number of the round, and must be equal
        on all workers."""
        part = self._own.due
        compressor = part.options.compression.at(part.rounds)
        return as_text({"compressor": compressor, "d": part.d, "round": self._own.rounds})

    def _check(self, hellos: Sequence[Hello], mine: Hello) -> None:
        """Check that arguments, anchors and messages match on all workers. If they do not match, the right value is the
        one that most workers have or, in a tie, the one of the lowest rank. Messages are compared only if the anchors
        match.

        If arguments or messages differ, ConfigError is raised on the workers that do not have the right value, and
        RoundFailedError on the workers that have it. If anchors differ, RoundFailedError is raised on all workers. A
        worker that does not have the right anchor then loads another worker's state at the next quorum. In the first
        round of a worker, different anchors raise ConfigError on this worker instead.

        If two workers have one name, because both have loaded one checkpoint, ConfigError is raised on those of the two
        that have not joined, and RoundFailedError on all other workers.
        """
        names = [h.worker for h in hellos]
        if len(set(names)) < len(names):
            if names.count(mine.worker) > 1 and not self._own.has_joined:
                raise ConfigError(
                    f"another worker has loaded the checkpoint of worker {mine.worker:x}, whose updates would be sent "
                    f"twice: load it on one worker, and give each worker a checkpoint folder of its own"
                )
            raise RoundFailedError("two workers have loaded one checkpoint")
        if len({h.arguments for h in hellos}) > 1:
            text = self.arguments()
            self._compare("be given the same arguments", text, hellos)
            # No error was raised, so the current arguments are equal. The hashes are those at joining, and frozen
            # parameters have changed since some workers joined. So replace the hash.
            self._arguments_hash = hash_of(text)
        where = [(h.history, h.anchor) for h in hellos]
        if len(set(where)) == 1:
            if len({h.message for h in hellos}) > 1:
                self._compare("send messages of one kind", self._message(), hellos)
            return
        own = self._own
        if not own.roster.past:
            ensure = "set the same seed on all" if own.site.size > 1 else "use a Manager with init_sync=True"
            raise ConfigError(f"workers must begin at the same parameters: {ensure}")
        if (mine.history, mine.anchor) != most(where):
            _log.warning("worker %x replaces its anchor, which differs from the other workers' anchors", own.worker)
            self._quorum.mark_as_behind()
        raise RoundFailedError("workers have different anchors")

    def _compare(self, must: str, text: str, hellos: Sequence[Hello]) -> None:
        """Compare `text`, such as this worker's arguments, with the other workers' texts, and raise an error unless all
        texts are equal. `must` completes the message "workers must ...". Collective.

        The error names a worker whose text is not the most frequent one, and the first line in which its text differs
        from the most frequent one. It is a ConfigError on every worker whose text is not the most frequent one, and a
        RoundFailedError on all other workers.
        """
        with self._own.site.fails_together():
            texts = self._channel.gather_text(text, self.device, "members")
        usual, mine = most(texts), self._channel.group.rank
        if len(set(texts)) == 1:
            return
        other = mine if texts[mine] != usual else next(i for i, found in enumerate(texts) if found != usual)
        pairs = zip_longest(texts[other].split("\n"), usual.split("\n"), fillvalue="nothing more")
        here, there = next(pair for pair in pairs if pair[0] != pair[1])
        error = f"workers must {must}, but worker {hellos[other].worker:x} has {here} and the others have {there}"
        raise ConfigError(error) if other == mine else RoundFailedError(error)
