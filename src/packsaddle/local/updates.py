"""LocalUpdates: workers train separately with any optimizer, and exchange compressed local updates at intervals.

Start with `LocalUpdates._attempted`, which runs after each inner step. The exchange is in `fragment`. After every
`every` inner steps it computes

    v = decay e + (s - x) + xi              x: this worker's parameters, which started at s; xi: shared noise
    e <- v - C(v)                           e: the error memory, the part of v that the compressor C did not send
    a <- outer step along mean_i C(v_i)     a: the anchor, the parameters last agreed on, identical on all workers
    x <- s = a - e                          s = a without `keep_unsent`; with a `delay` x keeps the steps made meanwhile

With every=1, x <- a, inner SGD and no outer optimizer, this is the paper's Algorithm 1. The design is that of DiLoCo
(Douillard et al. 2023) and its streaming form (2025), with the error feedback of Qsparse-local-SGD (Basu et al. 2019,
Algorithm 1).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.communicator import Communicator, as_text, check_agreement, ring_all_reduce
from packsaddle.comm.group import Group, training_group
from packsaddle.comm.join import JoinableSteps
from packsaddle.comm.ledger import Bytes, Ledger, Totals
from packsaddle.comm.managed import ManagedGroup
from packsaddle.comm.select_aggregator import warn_if_nothing_compressed
from packsaddle.comm.sharding import local_part
from packsaddle.compressors import Compressor, Sign, describe
from packsaddle.feedback.background import Background
from packsaddle.feedback.checks import Drift, DriftGuard, fingerprint
from packsaddle.feedback.compression import Compression, Schedule
from packsaddle.feedback.escape import Escape, EscapeCheck, Reset
from packsaddle.feedback.guard import Records
from packsaddle.feedback.noise import Noise
from packsaddle.feedback.optimizers import Attempts, as_optimizers, check_scaler, parameters_of
from packsaddle.feedback.state import ANY, Rule, State, Value, Vector, attribute, skip
from packsaddle.local.clipping import Clip
from packsaddle.local.elastic.membership import Membership
from packsaddle.local.fragment import Fragment, by_parameter, partition
from packsaddle.local.inner import (
    OtherOptimizers,
    Shards,
    check_covers,
    check_no_others,
    check_not_exchanged,
    check_parameters,
    named_parameters,
    names_of,
)
from packsaddle.local.joined import with_members
from packsaddle.local.lockstep import Call, Lockstep
from packsaddle.local.moments import MeanMomentum
from packsaddle.local.options import Elastic, LocalOptions, Outer, Overlap, Workers
from packsaddle.local.outcomes import Outcomes
from packsaddle.local.outer import OuterOptimizer
from packsaddle.local.participation import Participation
from packsaddle.local.start import UnsentSteps, check_first_step, makes_equal, share_start, untrained_tensors
from packsaddle.numerics.kernels import compiler
from packsaddle.numerics.seeds import as_seed
from packsaddle.options.agreement import agreement


def _rules(*, keep_unsent: bool) -> list[Rule]:
    """Return rules for the entries of the saved state: shared by all workers or not, and how to convert them.

    With `keep_unsent`, a worker continues at a - e. An owner's residual that is added to e moves this point but not the
    parameters, so it is also added to `Anchor.owed`.
    """
    part = ("fragments", ANY)
    error, owed = (*part, "error", ANY), (*part, "owed", ANY)
    return [
        Rule(error, "error"),
        Rule(owed, "error", like=error),
        Rule((*part, "owner_error", ANY), "owner", into=[error, owed] if keep_unsent else [error]),
        Rule((*part, "exchange", "start", ANY), "error"),
        Rule((*part, "exchange", "invalid"), "constant", value=False),  # the next round checks the parameters
        Rule((*part, "invalid"), "constant", value=False),
        Rule(("reset",), "constant", value=False),
        *(Rule((*part, name), "own") for name in ("owner_error", "owed", "aggregator")),
        *(Rule((*part, name), "own") for name in ("contraction", "clipped", "trained")),
        *(Rule((*part, name), "shared") for name in ("rounds", "rejected", "anchor", "exchange")),
        *(Rule(("identity", name), "constant") for name in ("rank", "workers")),
        *(Rule((name,), "own") for name in ("skips", "ledger", "uncompressed", "share", "membership")),
        *(Rule((name,), "shared") for name in ("format", "identity", "steps", "outer", "escape")),
        *(Rule((name,), "shared") for name in ("resets", "drifts")),
    ]


def _with_checksums(same: dict[str, object], frozen: Mapping[str, Tensor]) -> str:
    """Return arguments as text, with checksums of the frozen parameters."""
    return as_text(same | {f"checksum of {name}": int(fingerprint(local_part(t))) for name, t in frozen.items()})


class LocalUpdates(Records, JoinableSteps):
    """Local training with any torch optimizers: workers' parameter changes are compressed and averaged every few steps.

    The training loop does not change: hooks on `optimizer.step()` count steps, and after every `every`-th step they
    exchange the parameters' changes. Do not exchange gradients as well: no DistributedDataParallel between workers (if
    a framework wraps the model in it, see `keep_gradients_local`). The anchor is the parameters last agreed on by all
    workers.

    Args:
        optimizer: the inner optimizer, which steps on each worker separately, or a list, such as [muon, adamw]: any
            torch optimizers of floating-point parameters on one device. Parameters may be DTensors of FSDP2 and tensor
            parallelism: each process exchanges its shard. A step counts when all optimizers have stepped.
        compressor: the compressor, or a function of the round's index that returns it, or a `Compression` with all
            settings of the exchange.
        every: H, inner steps between two exchanges of a fragment.
        outer: the outer optimizer, such as `OuterSGD()`, DiLoCo's: a function that returns a torch optimizer of the
            anchor's tensors, float32 or wider. Its gradient is the workers' mean update. None: the mean update is
            subtracted from the anchor.
        mean_momentum: c in [0, 1]. After a round with the compressed mean update u, AdamW's first moments m (state
            `exp_avg`; v is `exp_avg_sq`) become (1 - c) m + c ||m|| d / ||d||, d = sqrt(v) u, so that the next steps
            continue along u. It sends nothing. With AdamW 0.5 lowered the loss of language models (betas 0.8 or
            0.9, and 0.99); with [muon, adamw] it raised it. 0: m stays the worker's own.
        overlap: inner steps during which an exchange runs, below `every`, or an `Overlap` with more settings.
        workers: the process group of the workers, or `Workers` with weights, a sample of them or a limit on their
            updates; or a torchft Manager or `Elastic`, for workers that join and leave. None: the default group, or
            this process alone without one.
        noise: standard deviation, per coordinate and in units of the parameters, of the Gaussian noise added in each
            round, identical on all workers; or a function of the round's index that returns it.
        escape: the saddle escape check (Algorithm 1, lines 4-8), run on the anchor after each round; its interval and
            `every` count rounds. It needs one fragment and no delay.
        keep_unsent: after an exchange this worker continues at a - e, where a is the anchor and e its error memory, so
            the unsent part of its update stays in its own parameters, as in CSER (Xie et al. 2020). It trains better
            than False: continue at a, as in Algorithm 1 and DiLoCo.
        offload: keep the anchor, the error memory and the outer optimizer's state on the CPU.
        seed: seed of all shared randomness; identical on all workers.
        scaler: the GradScaler that steps the optimizer, so that the steps it skips on one worker are counted too.
        model: the module that the optimizers train. Its frozen parameters and persistent buffers are also set to
            rank 0's, and ValueError is raised if it has a trainable parameter that is in none of the optimizers. With a
            manager they are not set: ConfigError is raised when a worker joins whose frozen parameters differ. Without
            it, RuntimeError is raised once another optimizer has stepped with parameters of the same module. Saved
            states have its names of parameters: a run that resumes needs `model` if it was given before, else none.

    A round in which a worker's parameters are not finite is rejected on all workers, and recorded in `skips`. That
    worker resets its parameters to their values after the last exchange, and clears non-finite entries of its
    optimizers' state and, if necessary, of their `state_dict`. The others keep their local updates for the next round.
    All workers raise NonFiniteError after more than `max_skipped` consecutive rejected rounds, and if an optimizer
    cannot be reset.

    Construction is collective: every worker starts from rank 0's parameters. Weights may be loaded until the first
    step, on every worker. With a manager it is not collective: the first step, or `join`, waits for the others, and a
    worker that joins later receives their anchor. Raises ValueError or TypeError for invalid arguments, also if they
    differ between workers; RuntimeError if a launcher has set WORLD_SIZE above 1 and there is no process group;
    RuntimeError at the first step if gradients are identical on all workers, so exchanged already; and RuntimeError if
    workers make different calls, for example a round and `flush`, after unequal numbers of steps. Within torch's
    `Join([local])` a worker that has ended joins the others' rounds instead. If training ends with steps after the
    last `flush`, `state_dict` or use of the anchor, rank 0 logs a warning.

    >>> import torch
    >>> from packsaddle import LocalUpdates, Sign
    >>> model = torch.nn.Linear(64, 64)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> local = LocalUpdates(optimizer, every=2, compressor=Sign(per_tensor=True))
    >>> for batch in torch.rand(4, 8, 64):
    ...     optimizer.zero_grad()
    ...     (model(batch) - batch).square().mean().backward()
    ...     optimizer.step()
    >>> local.rounds
    2
    >>> local.flush()
    True
    """

    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        compressor: Compressor | Schedule | Compression = Sign(per_tensor=True),  # noqa: B008 -- immutable
        *,
        every: int = 8,
        outer: Outer | None = None,
        mean_momentum: float = 0.0,
        overlap: int | Overlap = 0,
        workers: Any = None,
        noise: float | Callable[[int], float] | Noise = 0.0,
        escape: Escape | None = None,
        keep_unsent: bool = True,
        offload: bool = False,
        seed: int = 0,
        scaler: torch.amp.GradScaler | None = None,
        model: torch.nn.Module | None = None,
    ) -> None:
        # Check the arguments.
        if isinstance(compressor, Optimizer):
            raise TypeError("several optimizers must be given as a list: LocalUpdates([muon, adamw])")
        self.optimizers = as_optimizers(optimizer)
        check_not_exchanged(self.optimizers)
        check_scaler(scaler)
        if not (model is None or isinstance(model, torch.nn.Module)):
            raise TypeError(f"model must be a torch Module or None, got {model!r}")
        self.options = options = LocalOptions.of(
            *(compressor, overlap, workers, noise),
            every=every,
            outer=outer,
            mean_momentum=mean_momentum,
            escape=escape,
            keep_unsent=keep_unsent,
            offload=offload,
            seed=as_seed(seed),
        )
        options.compression.at(0)

        # Collect the trained parameters, and the other tensors of the model.
        named = named_parameters(self.optimizers, model)
        self._parameters = {name: p for name, p in named.items() if p.requires_grad}
        check_parameters(self._parameters)
        if model is not None:
            check_covers(self._parameters.values(), model)
        untrained = untrained_tensors(named, model)
        self.steps = 0  # inner steps, including those that a scaler skipped
        self._with_others = Bytes()  # correction of `uncompressed` for steps with another number of workers
        self._has_begun = False  # the first inner step has begun, or was skipped by a scaler
        self._at_anchor = 0  # number of open `at_anchor` contexts, which may be nested
        self._has_ended = False  # in torch's Join: this worker has no more data

        # Set up the group, the fragments (parameters exchanged together), the outer optimizer, and what a round does.
        is_elastic = isinstance(options.workers, Elastic)
        device = torch.device("cpu") if offload else local_part(next(iter(self._parameters.values()))).device
        group = self._training_group()
        super().__init__(group, device, elastic=is_elastic)
        self._connect(group, device)
        agree = Shards(self._parameters.values())
        self._make_fragments(device, agree)
        leaves = {n: a for part in self._fragments for n, a in zip(part.names, part.anchor.leaves, strict=True)}
        named_leaves = {name: leaves[name] for name in self._parameters}
        self._outer = None if outer is None else OuterOptimizer(outer, named_leaves)
        self.outer: Optimizer | None = None if self._outer is None else self._outer.optimizer
        self._set_up_rounds(agree)

        # Compare the arguments of all workers, and set the parameters to rank 0's; with a manager, on joining.
        same = self._equal_arguments(untrained)
        self.membership: Membership | None = None  # the rounds of workers that join and leave; None: no manager
        if is_elastic:
            settings = (options, self._fragments, self._channel)
            frozen = {name: t for name, t in untrained if isinstance(t, torch.nn.Parameter)}
            compared = partial(_with_checksums, same, frozen)
            self.membership = Membership(*settings, self.optimizers, self._outer, self._outcomes, compared)
        else:
            check_agreement(self._channel, same, device)
            self._participation.exchange(self._channel, device)
            share_start(self._channel, [*self._parameters.values(), *(tensor for _, tensor in untrained)], device)
            self._set_anchor_before_first_step()

        # Register hooks that count the optimizers' steps.
        watches = model is None and (group.size > 1 or is_elastic)
        self._others = OtherOptimizers(list(self._parameters.values()), group) if watches else None
        for each in with_members((*self.optimizers, *([self.outer] if self.outer else []))):
            each.exchanged_by = self  # type: ignore[attr-defined]
        warns = not is_elastic and group.size > 1 and group.rank == 0 and group.sends
        self._unsent = UnsentSteps(self if warns and self.join_process_group else None)
        self._attempts = Attempts(self.optimizers, scaler, self._before_step, self._attempted)

    def _training_group(self) -> Group:
        """Return the group of the workers, or the manager's."""
        workers = self.options.workers
        if isinstance(workers, Elastic):
            return workers.group or ManagedGroup(workers.manager)
        return training_group(workers.group)

    def _connect(self, group: Group, device: torch.device) -> None:
        """Set up communication. Exchanges with a delay run in the background if the group supports it."""
        options = self.options
        apart = group.background(device) if options.overlap.delay and group.size > 1 else None
        behind = Background(device) if apart is not None else None
        has_norms = options.workers.clip is not None
        self.ledger = Ledger()
        self._channel = Communicator(apart or group, self.ledger)
        self._lockstep = Lockstep(self._channel, device, behind, norms=has_norms)
        uncounted = Communicator(self._channel.group, Ledger())
        self._checks = Lockstep(uncounted, device, behind, norms=has_norms)
        fixed = options.workers if isinstance(options.workers, Workers) else Workers()
        self._participation = Participation(fixed.weight, fixed.sample, group.size, group.rank, options.seed)

    def _make_fragments(self, device: torch.device, agree: Shards) -> None:
        """Divide the parameters into fragments, and set the compressor of each."""
        spec = self.options.compression
        with torch.no_grad():
            self._fragments = partition(self._parameters, self.options, self._channel, device, agree)
        self._trained = {id(each.parameter): each for part in self._fragments for each in part.trained}
        d = sum(part.compressed_d for part in self._fragments)
        warn_if_nothing_compressed(spec.at(0), d, spec.dense_below, stacklevel=3)
        spec.at(0).validate(d)
        self._has_schedule = not isinstance(spec.compressor, Compressor)
        for part in self._fragments:
            part.use(spec.at(0))

    def _set_up_rounds(self, agree: Shards) -> None:
        """Set up what follows an exchange: outcomes and resets, comparisons, escape checks, and the saved state."""
        spec, rule = self.options.compression, self.options.escape
        c = self.options.mean_momentum
        momentum = MeanMomentum(self.optimizers, c, agree) if c else None
        rank = self._channel.group.rank
        self._outcomes = Outcomes(self.optimizers, self._fragments, agree, spec.max_skipped, rank, momentum)
        self._skips = self._outcomes.skips
        self._drift = DriftGuard(0 if self._has_manager else spec.compare_every, spec.on_drift, self._channel)
        self._escape = self._escape_check(rule) if rule is not None else None
        self._resets: list[Reset] = []  # records of the escape check's firings
        rules = _rules(keep_unsent=self.options.keep_unsent)
        self.saved_state = State("LocalUpdates", rules, self._identity, self._saved_fields)

    def _equal_arguments(self, untrained: Iterable[tuple[str, Tensor]]) -> dict[str, object]:
        """Return the arguments that must be equal on all workers, by name."""
        spec, workers = self.options.compression, self.options.workers
        same: dict[str, object] = {"weight": workers.weight is not None} if isinstance(workers, Workers) else {}
        same |= agreement(self.options) | {"kernels": compiler(self.join_device)}
        if self._has_schedule:  # workers may have other compressors, with one function
            same["compressor of round 0"] = describe(spec.at(0))
        same["outer"] = None if self.outer is None else (type(self.outer).__name__, self.outer.defaults)
        for kind, tensors in (("params", self._parameters.items()), ("untrained", untrained)):
            for i, (name, p) in enumerate(tensors):
                same[f"{kind}[{i}]"] = f"{name} {list(p.shape)} {p.dtype}"
        return same

    def __repr__(self) -> str:
        compressor = describe(self.options.compression.at(self.rounds))
        outer = type(self.outer).__name__ if self.outer else "mean"
        return (
            f"LocalUpdates({names_of(self.optimizers)}, every={self.options.every}, {compressor}, outer={outer}, "
            f"fragments={len(self._fragments)}, workers={self._channel.group.size}, steps={self.steps}, "
            f"rounds={self.rounds})"
        )

    # Inner steps, and the rounds that follow them.

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer) -> None:
        self._check_here("optimizer.step()")
        check_no_others(optimizer, self._trained)
        for p in parameters_of([optimizer]):
            if id(p) in self._trained:
                self._trained[id(p)].note_step()
        self._set_anchor_before_first_step()
        self._has_begun = True
        if self.membership is not None and not self.membership.joined:
            self.join()
            self._attempts.are_discarded = True
            for p in self._parameters.values():  # computed before the others' parameters were loaded
                p.grad = None

    @torch.no_grad()
    def _attempted(self, *, has_ended: bool = False) -> bool:
        """Count an inner step, applied or skipped by a scaler; then run the rounds that are due.
        Returns True if collectives were run with a fixed set of workers. `has_ended`: this worker no longer trains."""
        # Count the step, and check it.
        self._check_here("optimizer.step()")  # a step that a scaler skips has no `_before_step`
        if self._others is not None:
            self._others.check()
        self._set_anchor_before_first_step()
        self._has_begun = True
        self._has_ended = has_ended
        if self.membership is not None:
            self.join()  # if a scaler has skipped the first step, which would have joined
        self.steps += 1
        self._outcomes.check_step()
        # With a manager, the workers present decide when a round is due.
        if self.membership is not None:
            self.membership.stepped(self.steps)
            return False
        # Run the collectives of a fixed set of workers. If one fails, `flush` would fail too: clear its warning first.
        ended = [part for part in self._fragments if part.current is not None and part.current.due == self.steps]
        due = [part for part in self._fragments if part.is_due(self.steps)]
        has_work, applied = self.steps == 1 or bool(ended or due), list[Fragment]()
        if has_work:
            self._unsent.clear()
            if not has_ended:
                self._announce()
            if self.steps == 1:
                anchors = [part.anchor.flat for part in self._fragments]
                run = partial(self._lockstep.run, "checks its first step", self.steps)
                check_first_step(self._channel, anchors, self._parameters.values(), run)
            for part in ended:
                self._finish(part)
            applied = [part for part in due if self._begin(part)]
        equal = applied == self._fragments and makes_equal(self.options, applied)
        self._unsent.record(self.steps, exchanged=bool(due), equal=equal)
        return has_work

    def _begin(self, part: Fragment, *, flush: Compressor | None = None) -> bool:
        """Begin a round of one fragment; without a delay finish it too. Return False if it is rejected already."""
        # A flush has no delay, and all workers take part in it.
        call: Call = "calls flush()" if flush else "exchanges a round"
        delay = 0 if flush else self.options.overlap.delay
        share = self._participation.share() if flush else self._participation.share_after(self.steps)
        p = part.begin(self.steps + delay, share, later=delay > 0, flush=flush)
        if p.norm is not None and self._has_ended:  # it has no local update with which others' could be compared
            p.norm.neg_()
        self._outcomes.register(part, p)
        # Without an outer optimizer and a delay, the mean is subtracted from the anchor term by term.
        as_vector = delay > 0 or self.outer is not None
        exchange = partial(part.exchange, p, self.steps - 1, as_vector=as_vector)
        assert p.round is not None
        compressor = part.feedback.compressor if self._has_schedule else None
        result = p.round.v if delay else None
        p.wait = self._lockstep.start(call, self.steps, exchange, result, p.norm, compressor, p.frozen or ())
        return delay > 0 or self._finish(part)

    def _finish(self, part: Fragment) -> bool:
        """Finish the current exchange of one fragment: apply and record it. Return False if it is rejected."""
        t, p = part.rounds, part.apply_exchange(self.outer)
        if not self._outcomes.record(part, t, p):
            return False
        # The anchors must be equal on all workers.
        if self._drift.due(t) and part is self._fragments[-1]:
            before = list[list[Tensor]]()  # the start points, if anchors differ

            def named() -> list[tuple[str, Tensor]]:
                before.extend(f.anchor.copy_starts() for f in self._fragments)
                return [(f"anchor of {p.name}", view) for f in self._fragments for p, view in f.named(f.anchor.flat)]

            anchors = [f.anchor.flat for f in self._fragments]
            step = p.due - self.options.overlap.delay
            self._lockstep.run("compares anchors", step, partial(self._drift.compare, t, anchors, named))
            # The parameters move with a repaired anchor; else the difference would be sent as a local update.
            for f, starts in zip(self._fragments, before, strict=False):
                if f.current is None:  # else a running exchange will move them
                    f.anchor.move(starts)
        # Lines 4-8 of Algorithm 1, at the anchor.
        if self._escape is not None:
            try:
                reset, lost = self._escape.run(part.rounds, part.feedback.pending())
                if reset is not None:
                    part.feedback.reset(lost)
                    self._resets.append(reset)
            finally:
                part.anchor.move_to_start()
                if p.leaves_rest:
                    part.anchor.move_to_anchor()
        return True

    def _escape_check(self, rule: Escape) -> EscapeCheck:
        """Return the saddle escape check, run on the anchor; its `interval` and `every` are numbers of rounds."""
        if len(self._fragments) > 1 or self.options.overlap.delay:
            raise ValueError("escape needs fragments=1, delay=0 and no tensor parallelism: it compares whole anchors")
        (whole,) = self._fragments

        def at_anchor() -> float | Tensor:
            whole.anchor.set_parameters(whole.anchor.views)
            return rule.objective()

        where = whole, whole.anchor.flat, self._channel, self.options.seed
        return EscapeCheck(replace(rule, objective=at_anchor), *where)

    @torch.no_grad()
    def _set_anchor_before_first_step(self) -> None:
        """Set the anchor to the parameters if no step was made yet, since weights may have been loaded."""
        joined = self.membership is not None and self.membership.joined
        if self.steps == 0 and not self._has_begun and not joined:
            for part in self._fragments:
                part.anchor.set_from_parameters()
            if self._escape is not None:
                self._escape.begin()

    def _check_here(self, call: str) -> None:
        if self._at_anchor:
            raise RuntimeError(f"{call} within at_anchor(), which puts parameters back at its end")

    def _check_between_steps(self, call: str) -> None:
        if missing := self._attempts.missing():
            hint = "" if self._attempts.scaler else "; if a GradScaler has skipped it, pass scaler="
            raise RuntimeError(f"{call} must come between two steps, and {missing} has still to take its own{hint}")

    # Workers that skip a round, join and leave.

    @property
    def sampled(self) -> bool:
        """True if this worker is in the next exchange (see `Workers.sample`); else it may train or call `sit_out`."""
        next_round = self.steps + min(part.until_due(self.steps) for part in self._fragments)
        return self._participation.share_after(next_round) > 0

    def sit_out(self) -> None:
        """Count the inner steps up to the next exchange without training, then run that exchange; collective.
        Raises RuntimeError with a manager."""
        self._check_here("sit_out()")
        self._check_between_steps("sit_out()")
        if self.membership is not None:
            raise RuntimeError("sit_out is for a fixed set of workers; with a manager, an absent one is left out")
        self._attempted()
        while not self.exchanging:
            self._attempted()

    @torch.no_grad()
    def join(self) -> None:
        """Wait for the other workers' next round, and load their averaged parameters. Call with a manager, before
        training.

        Without this call the first step joins, and discards its gradient, which was computed at other parameters. A
        worker that returns loads its error memory from its file. Raises RuntimeError without a manager.
        """
        membership = self._elastic("join")
        if not membership.joined:
            self._set_anchor_before_first_step()
            membership.join()
            self.steps = max(self.steps, membership.steps)

    @torch.no_grad()
    def leave(self) -> bool:
        """Save or send this worker's pending updates, and leave. Call with a manager, before the process ends early.

        The updates are saved to `Elastic.memory_file` or, if that is None or cannot be written, sent uncompressed in
        one more round. Returns False, with an error in the log, if both fail. Raises RuntimeError without a manager.
        """
        return self._elastic("leave").leave()

    def _elastic(self, call: str) -> Membership:
        if self.membership is None:
            raise RuntimeError(f"{call} is for workers that come and go: LocalUpdates(..., workers=Elastic(...))")
        self._check_here(f"{call}()")
        return self.membership

    # Properties: counts and records of the training so far.
    @property
    def rounds(self) -> int:
        """The number of applied exchanges, summed over fragments (parts of the model exchanged together)."""
        return sum(part.rounds for part in self._fragments)

    @property
    def clips(self) -> list[Clip]:
        """The updates of all workers that `Workers.clip` scaled down since construction or `load_state_dict`."""
        return sorted((clip for part in self._fragments for clip in part.clips.found), key=lambda clip: clip.step)

    @property
    def clipped(self) -> int:
        """The number of clipped updates in total, of all workers."""
        return sum(part.clips.count for part in self._fragments)

    @property
    def resets(self) -> list[Reset]:
        """Records of all firings of the saddle escape check: round, reason and decision (Algorithm 1, lines 4-8)."""
        return self._resets

    @property
    def lost(self) -> float:
        """The sum of the norms of error memories that workers lost; 0 without a manager."""
        return 0.0 if self.membership is None else self.membership.lost

    @property
    def position(self) -> int:
        """The number of inner steps that the anchor includes, of all workers, also those that have left."""
        return self.steps * self._channel.group.size if self.membership is None else self.membership.roster.position

    @property
    def contraction(self) -> float | None:
        """The fraction 1 - ||v - C(v)||^2 / ||v||^2 of this worker's update v that compression C last kept; None: not
        measured.

        Averaged over the fragments measured; see `Compression.monitor_every`.
        """
        found = [part.contraction.whole for part in self._fragments if part.contraction.whole is not None]
        return sum(found) / len(found) if found else None

    @property
    def uncompressed(self) -> Bytes:
        """The bytes that a ring all-reduce of the gradients in each of the steps so far would have sent."""
        size = sum(local_part(p).nbytes for p in self._parameters.values())
        return self._with_others + ring_all_reduce(self.steps * size, self._channel.group.size)

    def _load_uncompressed(self, saved: Bytes) -> None:
        self._with_others = Bytes()
        self._with_others = saved - self.uncompressed  # another number of workers may have saved it

    @property
    def exchanging(self) -> bool:
        """True if an exchange began after the last inner step; identical on all workers."""
        if self.membership is not None:
            return self.membership.exchanged
        return any(part.is_due(self.steps) for part in self._fragments)

    # The anchor (parameters last agreed on by all workers), and updates that it does not include.

    @torch.no_grad()
    def wait(self) -> None:
        """Wait for running exchanges, so that the ledger has their bytes. Each is still applied at its due step."""
        for part in self._fragments:
            if part.current is not None:
                part.close()

    @torch.no_grad()
    def error(self) -> Tensor:
        """Return the mean of `pending` over workers, weighted by `weight` if set, float[d]; collective.

        Without an outer optimizer, the anchor minus error() moves as in training without compression. d is the number
        of elements in this process's shards. Raises RuntimeError with a manager: use `pending`.
        """
        if self.membership is not None:
            raise RuntimeError("error is of workers that are all there; with a manager, pending() is this worker's own")
        found = self._unapplied("error()")
        self._announce()
        for vector in found:
            vector.mul_(self._participation.share())
            self._lockstep.run("calls error()", self.steps, partial(self._channel.mean, vector, "inspection"))
        return self._joined(found)

    @torch.no_grad()
    def pending(self) -> Tensor:
        """Return this worker's updates still to be subtracted from the anchor, float[d], in the optimizer's order.

        They are the error memory, the local update since the last exchange, and the update in a running exchange, for
        which it waits.
        """
        return self._joined(self._unapplied("pending()"))

    def _unapplied(self, call: str) -> list[Tensor]:
        self._check_here(call)
        self._set_anchor_before_first_step()
        self.wait()
        return [part.unapplied() for part in self._fragments]

    def _joined(self, vectors: Iterable[Tensor]) -> Tensor:
        """Concatenate one vector per fragment into float[d], with parameters in the optimizer's order."""
        found = by_parameter(self._fragments, vectors)
        return torch.cat([found[name].reshape(-1) for name in self._parameters])

    def anchor(self) -> dict[str, Tensor]:
        """Return a copy of the anchor, the parameters last agreed on by all workers, as a dict by parameter name.

        Names are those in the optimizers, if they have different ones, as by AdamW(model.named_parameters()), else
        those in `model`, if it was given, else "parameter 0", .... The tensors are at least float32 and have the shapes
        of this process's shards.
        """
        self._set_anchor_before_first_step()
        self._unsent.clear()
        found = by_parameter(self._fragments, [part.anchor.flat for part in self._fragments])
        return {name: found[name].clone() for name in self._parameters}

    @contextmanager
    def at_anchor(self) -> Iterator[None]:
        """Set the parameters to the anchor within a context, to evaluate, certify or save one model for all workers.

        Inside, optimizer steps and calls that read this worker's changes, such as `flush`, raise RuntimeError. It is
        also a decorator, `@local.at_anchor()`, of an evaluation function.
        """
        self._set_anchor_before_first_step()
        before = [x.clone() for part in self._fragments for x in part.anchor.tensors()]
        with torch.no_grad():
            for part in self._fragments:
                part.anchor.set_parameters(part.anchor.views)
        self._at_anchor += 1
        self._unsent.clear()
        try:
            yield
        finally:
            self._at_anchor -= 1
            xs = [x for part in self._fragments for x in part.anchor.tensors()]
            for x, old in zip(xs, before, strict=True):
                x.copy_(old)

    def state_dict_of(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """Return a copy of the model's `state_dict` at the anchor: one model for all workers, to save on rank 0.

        `model.state_dict()` has this worker's own parameters instead. Tensors that `LocalUpdates` does not exchange,
        such as buffers, are this worker's. Not collective.

        >>> import torch
        >>> from packsaddle import LocalUpdates
        >>> model = torch.nn.Linear(64, 64)
        >>> local = LocalUpdates(torch.optim.AdamW(model.parameters()))
        >>> list(local.state_dict_of(model))
        ['weight', 'bias']
        """
        with self.at_anchor():
            return {
                name: value.clone() if isinstance(value, Tensor) else value
                for name, value in model.state_dict().items()
            }

    @torch.no_grad()
    def flush(self, compressor: Compressor | None = None) -> bool:
        """Exchange pending updates, so that all workers have the same parameters, those of the anchor; collective.

        Call at the end of training. Running exchanges are applied first; then pending updates of the whole model are
        exchanged without noise, and their mean is subtracted from the anchor, also with an outer optimizer, whose
        momentum is of whole rounds. Updates that compression leaves out stay in the error memories for later rounds.
        Returns True if all exchanges were applied. With a torchft Manager, this is an uncompressed round of all present
        workers, also of those that continue training.

        Args:
            compressor: compresses this exchange. None: Rounded("int4"), an eighth of the bytes, where rounds send no
                more than that, by exchange "auto" (the default) or "two-way", without `back`; elsewhere uncompressed.
                Identity(): uncompressed, after which error memories are 0 (except the excess of clipped updates, see
                `Workers`): use it before you freeze parameters.

        Parameters that were frozen at all steps since the last exchange keep their values. Raises TypeError or
        ValueError for an unsuitable compressor, also if workers pass different ones, and RuntimeError for a compressor
        with a manager.
        """
        # Check the call; with a manager, all present workers exchange a round.
        self._check_here("flush()")
        self._check_between_steps("flush()")
        self._set_anchor_before_first_step()
        if self._others is not None:
            self._others.check()
        if self.membership is not None:
            if compressor is not None:
                raise RuntimeError("flush takes a compressor with a fixed set of workers; with a manager, pass none")
            self.join()  # a worker without steps of its own may have a memory file to send
            return self.membership.round(uncompressed=True)
        # Compare the compressors, apply running exchanges, and exchange what is pending.
        self._announce()
        if compressor is not None:
            self._check_flush(compressor)
        self._unsent.clear()
        applied = [self._finish(part) for part in self._fragments if part.current is not None]
        last = [(part, compressor or part.last_compressor()) for part in self._fragments]
        for part, each in last:
            part.switch_to(each)
        applied += [self._begin(part, flush=each) for part, each in last]
        for part in self._fragments:
            part.end_flush()
        return all(applied)

    def _check_flush(self, compressor: Compressor) -> None:
        """Compare the compressor of a flush over workers, and check it; collective."""
        is_one = isinstance(compressor, Compressor)
        arguments = {"compressor of flush": describe(compressor) if is_one else repr(compressor)}
        device = self._fragments[0].anchor.flat.device
        compare = partial(check_agreement, self._channel, arguments, device)
        self._lockstep.run("calls flush(compressor)", self.steps, compare)
        if not is_one:
            raise TypeError(
                f"compressor must be a packsaddle Compressor, such as Rounded(), or None, got {compressor!r}"
            )
        compressor.validate(sum(part.compressed_d for part in self._fragments))

    @torch.no_grad()
    def average(self, tensors: torch.nn.Module | Iterable[Tensor]) -> None:
        """Replace tensors with their means over workers, weighted as by `Workers.weight`, uncompressed; collective.

        For tensors computed from each worker's own parameters, which differ between workers even after `flush`: a
        module such as torch's AveragedModel, whose parameters and buffers are averaged, or tensors such as z of a
        schedule-free optimizer. Tensors that are not floating point are set to worker 0's. Raises TypeError for
        anything else than tensors, ValueError, naming the first difference, if workers pass other shapes or dtypes, and
        RuntimeError with a manager.

        >>> import torch
        >>> from packsaddle import LocalUpdates
        >>> from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
        >>> model = torch.nn.Linear(64, 64)
        >>> local = LocalUpdates(torch.optim.AdamW(model.parameters()))
        >>> ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))  # update_parameters after each step
        >>> local.flush()
        True
        >>> local.average(ema)
        """
        if self.membership is not None:
            raise RuntimeError("average is for a fixed set of workers; with a manager, evaluate the anchor")
        if isinstance(tensors, torch.nn.Module):
            tensors = [*tensors.parameters(), *tensors.buffers()]
        tensors = list(tensors)
        for t in tensors:
            if not isinstance(t, Tensor):
                raise TypeError(f"tensors must be a module or tensors, and one is of type {type(t).__name__}")
        parts = [local_part(t) for t in tensors]
        means = [part for part in parts if part.is_floating_point()]
        same: dict[str, object] = {"number of tensors": len(parts)}
        same |= {f"tensors[{i}]": f"{list(part.shape)} {part.dtype}" for i, part in enumerate(parts)}

        def exchange() -> None:
            check_agreement(self._channel, same, self._fragments[0].anchor.flat.device)
            self._channel.average(means, "average", weight=self._participation.share())
            for part in parts:
                if not part.is_floating_point():
                    self._channel.broadcast(part, "average")

        self._announce()
        self._lockstep.run("calls average()", self.steps, exchange)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return this worker's state, of tensors and plain types; collective if an exchange is in progress.

        It contains the anchor, the error memory, running exchanges, the outer optimizer's state and the counts.
        Parameters and inner optimizers' states differ between workers, and must be saved separately, on every worker.
        Raises RuntimeError if one optimizer has made the current step and another has not.
        """
        self._check_here("state_dict()")
        self._check_between_steps("state_dict()")
        self._set_anchor_before_first_step()
        self.wait()
        self._unsent.clear()
        return self.saved_state.save({"fragments": [{} for _ in self._fragments]})

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError, naming the first difference, unless `load_state_dict` accepts `state`."""
        self.saved_state.validate(state)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state`, this worker's `state_dict`. Raises ValueError, with nothing changed, if it is invalid."""
        self._check_here("load_state_dict()")
        self.saved_state.validate(state)
        for part in self._fragments:
            part.abandon()
        self.saved_state.load(state)
        self._attempts.restart()
        for part, saved in zip(self._fragments, state["fragments"], strict=True):
            part.resume(saved)
        self._drift.resume(self._fragments[-1].rounds)
        self._unsent.clear()
        if self.membership is not None:
            self.membership.steps = self.steps

    def _saved_fields(self) -> list[Vector | Value]:
        return [
            *([] if self._outer is None else [self._outer.field()]),
            attribute(("steps",), self, "steps", int),
            *(field for i, part in enumerate(self._fragments) for field in part.fields(("fragments", i))),
            *(() if self._escape is None else self._escape.fields()),
            *self._outcomes.fields(),
            attribute(("resets",), self, "_resets", list[Reset]),
            attribute(("drifts",), self._drift, "found", list[Drift]),
            Value(("ledger",), Totals, self.ledger.state_dict, self.ledger.load_state_dict),
            Value(("uncompressed",), Bytes, lambda: self.uncompressed, self._load_uncompressed),
            Value(("share",), float, self._participation.share, skip),
            *(() if self.membership is None else self.membership.fields()),
        ]

    def _identity(self) -> dict[str, Any]:
        options, group = self.options, self._channel.group
        same: dict[str, Any] = {"seed": options.seed, "every": options.every, "delay": options.overlap.delay}
        same |= {"fragments": len(self._fragments), "keep_unsent": options.keep_unsent}
        same |= {"outer": options.outer is not None, "escape": options.escape is not None}
        same["parameters"] = "by number" if any(n.startswith("parameter ") for n in self._parameters) else "by name"
        if isinstance(options.workers, Elastic):
            return same | {"elastic": True}
        if options.workers.sample < 1:
            same["sample"] = options.workers.sample
        return same | {"rank": group.rank, "workers": group.size}

    def check_call(self, call: Call) -> None:
        """Raise RuntimeError, on all workers, if others make another call; collective, and not in the ledger. No-op
        with a manager."""
        if self.membership is None:
            self._checks.run(call, self.steps, lambda: None)

    trains_apart = True  # between rounds, parameters and inner optimizers' states differ between workers

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("LocalUpdates cannot be copied or pickled; use state_dict() and load_state_dict()")
