"""LocalUpdates: workers train separately with any optimizer, and exchange compressed local updates at intervals.

Start with `LocalUpdates._attempted`, which runs after each inner step. After every `every` inner steps a `LocalRound`
computes

    v = decay e + (s - x) + xi              x: this worker's parameters, which started at s; xi: shared noise
    e <- v - C(v)                           e: the error memory, the part of v that the compressor C did not send
    a <- outer step along mean_i C(v_i)     a: the anchor, the parameters last agreed on, identical on all workers
    x <- s = a - e                          s = a without `keep_unsent`; with a `delay` x keeps the steps made meanwhile

With every=1, x <- a, inner SGD and no outer optimizer, this is the paper's Algorithm 1. The design is that of DiLoCo
(Douillard et al. 2023) and its streaming form (2025), with the error feedback of Qsparse-local-SGD (Basu et al. 2019,
Algorithm 1).

Three objects own three questions: when (`Schedule`), with whom (`FixedWorkers` or `ElasticWorkers`), and what follows
a round (`Reactions`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.join import JoinableSteps
from packsaddle.comm.select_aggregator import warn_if_nothing_compressed
from packsaddle.comm.sharding import local_part
from packsaddle.compressors import Compressor, Sign, describe
from packsaddle.errors import suggests
from packsaddle.feedback.checks import DriftGuard
from packsaddle.feedback.compression import Compression, Schedule
from packsaddle.feedback.escape import Escape
from packsaddle.feedback.exchanging import Exchanging, register_exchange
from packsaddle.feedback.noise import Noise
from packsaddle.feedback.optimizers import Attempts, as_optimizers, check_scaler, parameters_of
from packsaddle.local.after import CompareAnchors, EscapeAnchor, Reactions
from packsaddle.local.elastic.workers import ElasticWorkers
from packsaddle.local.fixed import Connection, FixedWorkers
from packsaddle.local.fragment import partition
from packsaddle.local.inner import (
    OtherOptimizers,
    Shards,
    check_covers,
    check_no_others,
    check_not_exchanged,
    check_parameters,
    named_parameters,
    names_of,
    settings_of,
)
from packsaddle.local.lockstep import Call
from packsaddle.local.moments import MeanMomentum
from packsaddle.local.options import Elastic, LocalOptions, Outer, Overlap, Workers
from packsaddle.local.outcomes import Outcomes
from packsaddle.local.outer import OuterOptimizer
from packsaddle.local.records import Baseline, LocalRecords
from packsaddle.local.saved import saved_state
from packsaddle.local.start import StateDictWarning, UnsentSteps, untrained_tensors
from packsaddle.local.whole import WholeAnchor
from packsaddle.numerics.kernels import compiler
from packsaddle.numerics.seeds import as_seed
from packsaddle.options.agreement import agreement


class LocalUpdates(LocalRecords, Exchanging, JoinableSteps):
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
            it, RuntimeError is raised once another optimizer has stepped with parameters of the same module, unless
            that was made before `import packsaddle`, copied or unpickled. Saved states have its names of parameters: a
            run that resumes needs `model` if it was given before, else none.
        warn_own_state: warn once if `model.state_dict()` is called while this worker's parameters differ from the
            anchor. Set it to False in a script in which each worker saves its own.

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

    @suggests(
        compression="compressor", H="every", sync_every="every", period="every", local_steps="every", group="workers",
        process_group="workers", manager="workers", weight="workers", outer_optimizer="outer", delay="overlap",
        fragments="overlap", optimizers="optimizer", error_feedback="compressor", decay="compressor",
    )  # fmt: skip
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
        warn_own_state: bool = True,
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
        parameters = {name: p for name, p in named.items() if p.requires_grad}
        check_parameters(parameters)
        if model is not None:
            check_covers(parameters.values(), model)
        untrained = untrained_tensors(named, model)
        self.steps = 0  # inner steps, including those that a scaler skipped
        self._has_begun = False  # the first inner step has begun, or was skipped by a scaler

        # Set up when (a schedule of fragments), with whom (workers), and what follows a round (reactions).
        device = torch.device("cpu") if offload else local_part(next(iter(parameters.values()))).device
        to, is_elastic = Connection.of(options, device), isinstance(options.workers, Elastic)
        super().__init__(to.group, device, elastic=is_elastic)
        agree = Shards(parameters.values())
        with torch.no_grad():
            self._fragments, schedule = partition(parameters, options, to.channel, device, agree)
        self._check_compressor(options.compression)
        self._whole = WholeAnchor(self._fragments, parameters)
        made = None if outer is None else OuterOptimizer(outer, self._whole.leaves())
        self.outer: Optimizer | None = None if made is None else made.optimizer
        self._workers: FixedWorkers | ElasticWorkers
        if is_elastic:
            self._workers = ElasticWorkers(options, to.channel, self._fragments, schedule, self.optimizers, made)
        else:
            self._workers = FixedWorkers(
                *(options, to, device, self._fragments, schedule, self.outer, self._announce),
            )
        self._reactions = self._make_reactions(agree)
        self._baseline = Baseline(parameters.values())
        parts = parameters, self._fragments, self._workers, made, self._reactions, self._baseline
        self.saved_state = saved_state(self, options, *parts)

        # Compare the arguments of all workers, and set the parameters to rank 0's; with a manager, on joining.
        same = self._equal_arguments(parameters, untrained)
        self._workers.start(self._reactions, same, parameters, untrained)
        self._set_anchor_before_first_step()

        # Register hooks that count the optimizers' steps, and watches of mistakes.
        checks = model is None and (to.group.size > 1 or is_elastic)
        self._others = OtherOptimizers(list(parameters.values()), to.group, checks=checks)
        register_exchange(self, (*self.optimizers, *([self.outer] if self.outer else [])))
        if model is not None and warn_own_state and (to.group.size > 1 or is_elastic):
            StateDictWarning(model, self, LocalUpdates._is_off_anchor)
        warns = not is_elastic and to.group.size > 1 and to.group.rank == 0 and to.group.sends
        self._unsent = UnsentSteps(self if warns and self.join_process_group else None, self._whole.is_left)
        self._attempts = Attempts(self.optimizers, scaler, self._before_step, self._attempted)

    def _check_compressor(self, spec: Compression) -> None:
        """Check the compressor of the first round, and set it in each fragment."""
        d = sum(part.compressed_d for part in self._fragments)
        warn_if_nothing_compressed(spec.at(0), d, spec.dense_below, stacklevel=4)
        spec.at(0).validate(d)
        for part in self._fragments:
            part.use(spec.at(0))

    def _make_reactions(self, agree: Shards) -> Reactions:
        """Return what follows a round: outcomes and resets, first moments, comparisons of anchors, escape checks."""
        options, fragments, workers = self.options, self._fragments, self._workers
        spec, c, rank = options.compression, options.mean_momentum, workers.channel.group.rank
        outcomes = Outcomes(self.optimizers, fragments, agree, spec.max_skipped, rank)
        momentum = MeanMomentum(self.optimizers, c, agree) if c else None
        if momentum is not None and rank == 0:
            momentum.warn_if_advised_against(self.outer, stacklevel=5)
        drift, compare = DriftGuard(spec.compare_every, spec.on_drift, workers.channel), None
        if isinstance(workers, FixedWorkers):  # elastic workers compare their anchors at the start of a round
            compare = CompareAnchors(drift, fragments, workers.lockstep, options.overlap.delay)
        escape = None
        if options.escape is not None:
            escape = EscapeAnchor(options.escape, fragments, workers.channel, options.seed)
        return Reactions(outcomes, momentum, drift, compare, escape)

    def _equal_arguments(
        self, parameters: Mapping[str, Tensor], untrained: Iterable[tuple[str, Tensor]]
    ) -> dict[str, object]:
        """Return the arguments that must be equal on all workers, by name."""
        spec, workers = self.options.compression, self.options.workers
        same: dict[str, object] = {"weight": workers.weight is not None} if isinstance(workers, Workers) else {}
        same |= agreement(self.options) | {"kernels": compiler(self.join_device)}
        if not isinstance(spec.compressor, Compressor):  # workers may have other compressors, with one function
            same["compressor of round 0"] = describe(spec.at(0))
        same["outer"] = None if self.outer is None else (type(self.outer).__name__, self.outer.defaults)
        if workers.compare_optimizers:  # a worker that joins later may be at another point of a schedule of rates
            same |= settings_of(self.optimizers, of_groups=isinstance(workers, Workers))
        for kind, tensors in (("params", parameters.items()), ("untrained", untrained)):
            for i, (name, p) in enumerate(tensors):
                same[f"{kind}[{i}]"] = f"{name} {list(p.shape)} {p.dtype}"
        return same

    def __repr__(self) -> str:
        compressor = describe(self.options.compression.at(self.rounds))
        outer = type(self.outer).__name__ if self.outer else "mean"
        return (
            f"LocalUpdates({names_of(self.optimizers)}, every={self.options.every}, {compressor}, outer={outer}, "
            f"fragments={len(self._fragments)}, workers={self._workers.channel.group.size}, steps={self.steps}, "
            f"rounds={self.rounds})"
        )

    # Inner steps, and the rounds that follow them.

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer) -> None:
        self._whole.check_closed("optimizer.step()")
        trained = self._whole.trained
        check_no_others(optimizer, trained)
        for p in parameters_of([optimizer]):
            if id(p) in trained:
                trained[id(p)].note_step()
        self._set_anchor_before_first_step()
        self._has_begun = True
        if self._enter():
            self._attempts.are_discarded = True
            for each in trained.values():  # computed before the others' parameters were loaded
                each.parameter.grad = None

    @torch.no_grad()
    def _attempted(self, *, has_ended: bool = False) -> bool:
        """Count an inner step, applied or skipped by a scaler; then run the rounds that are due.
        Returns True if collectives were run with a fixed set of workers. `has_ended`: this worker no longer trains."""
        # Count the step, and check it. A step that a scaler skips has no `_before_step`.
        self._whole.check_closed("optimizer.step()")
        self._others.check()
        self._set_anchor_before_first_step()
        self._has_begun = True
        self._enter()
        self.steps += 1
        self._reactions.outcomes.check_step()
        # If a collective fails, `flush` would fail too: clear its warning first.
        self._unsent.clear()
        ran = self._workers.after_step(self.steps, self._whole.parameters, has_ended=has_ended)
        self._unsent.record(self.steps, exchanged=self.exchanging)
        return ran

    def _enter(self) -> bool:
        """Join elastic workers if this one has not; return True if the others' parameters were loaded."""
        entered = self._workers.enter()
        self.steps = max(self.steps, self._workers.steps) if entered else self.steps
        return entered

    @torch.no_grad()
    def _set_anchor_before_first_step(self) -> None:
        """Set the anchor to the parameters if no step was made yet, since weights may have been loaded."""
        if self.steps == 0 and not self._has_begun and not self._workers.has_joined:
            self._whole.set_from_parameters()
            if self._reactions.escape is not None:
                self._reactions.escape.check.begin()

    def _check_between_steps(self, call: str) -> None:
        """Raise RuntimeError within `at_anchor`, or if one optimizer has made the current step and another has not."""
        self._whole.check_closed(call)
        if missing := self._attempts.missing():
            hint = "" if self._attempts.scaler else "; if a GradScaler has skipped it, pass scaler="
            raise RuntimeError(f"{call} must come between two steps, and {missing} has still to take its own{hint}")

    # Workers that skip a round, join and leave.

    def sit_out(self) -> None:
        """Count the inner steps up to the next exchange without training, then run that exchange; collective.
        Raises RuntimeError with a manager."""
        self._check_between_steps("sit_out()")
        self._workers.check_fixed("sit_out")
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
        self._whole.check_closed("join()")
        self._set_anchor_before_first_step()
        self._workers.join()
        self.steps = max(self.steps, self._workers.steps)

    @torch.no_grad()
    def leave(self) -> bool:
        """Save or send this worker's pending updates, and leave. Call with a manager, before the process ends early.

        The updates are saved to `Elastic.memory_file` or, if that is None or cannot be written, sent uncompressed in
        one more round. Returns False, with an error in the log, if both fail. Raises RuntimeError without a manager.
        """
        self._whole.check_closed("leave()")
        return self._workers.leave()

    # The anchor (parameters last agreed on by all workers), and updates that it does not include.

    @torch.no_grad()
    def wait(self) -> None:
        """Wait for running exchanges, so that the ledger has their bytes. Each is still applied at its due step."""
        self._whole.wait()

    @torch.no_grad()
    def error(self) -> Tensor:
        """Return the mean of `pending` over workers, weighted by `weight` if set, float[d]; collective.

        Without an outer optimizer, the anchor minus error() moves as in training without compression. d is the number
        of elements in this process's shards. Raises RuntimeError with a manager: use `pending`.
        """
        self._workers.check_fixed("error")
        return self._whole.joined(self._workers.mean(self._unapplied("error()"), self.steps))

    @torch.no_grad()
    def pending(self) -> Tensor:
        """Return this worker's updates still to be subtracted from the anchor, float[d], in the optimizer's order.

        They are the error memory, the local update since the last exchange, and the update in a running exchange, for
        which it waits.
        """
        return self._whole.joined(self._unapplied("pending()"))

    def _unapplied(self, call: str) -> list[Tensor]:
        self._whole.check_closed(call)
        self._set_anchor_before_first_step()
        return self._whole.unapplied()

    def anchor(self) -> dict[str, Tensor]:
        """Return a copy of the anchor, the parameters last agreed on by all workers, as a dict by parameter name.

        Names are those in the optimizers, if they have different ones, as by AdamW(model.named_parameters()), else
        those in `model`, if it was given, else "parameter 0", .... The tensors are at least float32 and have the shapes
        of this process's shards.
        """
        self._set_anchor_before_first_step()
        self._unsent.clear()
        return self._whole.copy()

    def _is_off_anchor(self) -> bool:
        self._set_anchor_before_first_step()
        return self._whole.is_left()

    @contextmanager
    def at_anchor(self) -> Iterator[None]:
        """Set the parameters to the anchor within a context, to evaluate, certify or save one model for all workers.

        Inside, optimizer steps and calls that read this worker's changes, such as `flush`, raise RuntimeError. It is
        also a decorator, `@local.at_anchor()`, of an evaluation function.
        """
        self._set_anchor_before_first_step()
        self._unsent.clear()
        with self._whole.at_anchor():
            yield

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

        Parameters that were frozen at all steps since the last exchange keep their values and error memories. Raises
        TypeError or ValueError for an unsuitable compressor, also if workers pass different ones, and RuntimeError for
        a compressor with a manager.
        """
        self._check_between_steps("flush()")
        self._set_anchor_before_first_step()
        self._others.check()
        self._unsent.clear()
        return self._workers.flush(compressor, self.steps)

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
        if isinstance(tensors, torch.nn.Module):
            tensors = [*tensors.parameters(), *tensors.buffers()]
        self._workers.average(tensors, self.steps)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Return this worker's state, of tensors and plain types; collective if an exchange is in progress.

        It contains the anchor, the error memory, running exchanges, the outer optimizer's state and the counts.
        Parameters and inner optimizers' states differ between workers, and must be saved separately, on every worker.
        Raises RuntimeError if one optimizer has made the current step and another has not.
        """
        self._check_between_steps("state_dict()")
        self._set_anchor_before_first_step()
        self.wait()
        self._unsent.clear()
        return self.saved_state.save({"fragments": [{} for _ in self._fragments]})

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state`, this worker's `state_dict`. Raises ValueError, with nothing changed, if it is invalid."""
        self._whole.check_closed("load_state_dict()")
        self.saved_state.validate(state)
        for part in self._fragments:
            part.abandon()
        self.saved_state.load(state)
        self._attempts.restart()
        for part, saved in zip(self._fragments, state["fragments"], strict=True):
            part.resume(saved)
        self._drift.resume(self._fragments[-1].rounds)
        self._unsent.clear()
        self._workers.steps = self.steps

    def check_call(self, call: Call) -> None:
        """Raise RuntimeError, on all workers, if others make another call; collective, and not in the ledger. No-op
        with a manager."""
        self._workers.check_call(call, self.steps)

    def weight_in(self, state: Mapping[str, Any]) -> float:
        # A state of an earlier format, which `State.split` refuses, has no share.
        return float(state.get("share", 1.0))

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("LocalUpdates cannot be copied or pickled; use state_dict() and load_state_dict()")
