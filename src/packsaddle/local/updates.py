"""LocalUpdates: workers train separately with any optimizer, and exchange compressed local updates at intervals.

To read the code, start with `LocalUpdates._attempted`, which runs after each inner step, and continue with the module
`round`, which has what a round computes. With every=1, keep_unsent=False, SGD as inner optimizer and no outer
optimizer, this is Algorithm 1 of "Escaping Saddle Points with Compressed SGD". The design is that of DiLoCo (Douillard
et al. 2023) and its streaming form (2025), with the error feedback of Qsparse-local-SGD (Basu et al. 2019, Algorithm
1).

The set of workers, `FixedWorkers` or `ElasticWorkers`, asks its schedule when a round runs, runs it with the other
workers, and then calls the `Reactions` to its end.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.ledger import Bytes, Ledger
from packsaddle.comm.sharding import Shards, is_split, local_part
from packsaddle.compressors import Compressor, Sign, describe
from packsaddle.errors import suggests
from packsaddle.feedback.compression import AnyCompression
from packsaddle.feedback.escape import Escape, Reset
from packsaddle.feedback.exchanging import Exchanging, register_exchange
from packsaddle.feedback.guard import Records, Skips
from packsaddle.feedback.noise import Noise
from packsaddle.feedback.optimizers import Attempts, as_optimizers, check_scaler
from packsaddle.local.after import Reactions
from packsaddle.local.anchor import OuterOptimizer, note_step
from packsaddle.local.elastic.workers import ElasticWorkers
from packsaddle.local.fragment import WholeAnchor, check_compressor, partition
from packsaddle.local.moments import usual_fraction
from packsaddle.local.options import AnyOuter, AnyWorkers, Elastic, LocalOptions, Overlap
from packsaddle.local.round import Clip
from packsaddle.local.saved import Baseline, equal_arguments, in_current_parts, saved_state
from packsaddle.local.schedule import Every
from packsaddle.local.watch import (
    OtherOptimizers,
    StateDictWarning,
    UnsentSteps,
    Watches,
    check_covers,
    check_not_exchanged,
    check_parameters,
    named_parameters,
    names_of,
    untrained_tensors,
)
from packsaddle.local.workers import Call, FixedWorkers, WorkerSet
from packsaddle.numerics.devices import check_not_capturing, has_graphs
from packsaddle.numerics.seeds import as_seed


class LocalUpdates(Records, Exchanging):
    """Local training with any torch optimizers: each worker steps separately, and every few steps the workers'
    parameter changes are compressed and averaged.

    >>> import torch
    >>> from packsaddle import LocalUpdates
    >>> model = torch.nn.Linear(64, 64)
    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> local = LocalUpdates(optimizer, every=2, model=model)
    >>> for batch in torch.rand(4, 8, 64):
    ...     optimizer.zero_grad()
    ...     (model(batch) - batch).square().mean().backward()
    ...     optimizer.step()
    >>> local.rounds
    2
    >>> local.flush()
    True

    The training loop does not change: hooks on `optimizer.step()` count steps, and after every `every`-th step a round
    exchanges the changes of the parameters since the last round. Do not exchange gradients as well: no
    DistributedDataParallel between workers (if a framework wraps the model in it, see `keep_gradients_local`). Between
    rounds each worker has its own parameters. The anchor is the parameters last agreed on by all workers: evaluate and
    save it (`at_anchor`, `state_dict_of`).

    Call `flush` at the end, or train in `with LocalUpdates(...) as local:`, which calls `flush` when its block ends
    without an exception. After an exception it does not, since the other workers may not be there to take part.

    Args:
        optimizer: the inner optimizer, which steps on each worker separately, or a list, such as [muon, adamw]: any
            torch optimizers of floating-point parameters on one device. An inner step counts when all of the optimizers
            have stepped. Parameters may be DTensors of FSDP2 and tensor parallelism; then each process exchanges its
            shards with the processes that have the same shards on other workers (see `Workers.group`).
        compressor: the compressor, or a function of the round's index that returns it, or a `Compression` with all
            settings of the exchange.
        every: H, the number of inner steps from one exchange of a fragment (a part of the model) to the next. Or a
            function that returns H for the round that begins after a number of inner steps, from 0 on, such as
            `lambda step: 1 if step < 100 else 8`. It must return the same numbers on all workers, and in a run that
            resumes. Workers that join and leave, or make unequal numbers of steps, need a number.
        workers: the process group of the workers, or a `Workers` with more settings; a DeviceMesh, if workers are sites
            of several processes; or, for workers that join and leave, a torchft Manager or an `Elastic`. By default the
            workers are torch's default group or, if there is none, this process alone.
        model: the module that the optimizers train. Its frozen parameters and persistent buffers are also set to
            rank 0's (with a manager they are compared instead), and ValueError is raised if it has a trainable
            parameter that is in none of the optimizers. Saved states use its parameter names, so a run that resumes
            needs `model` if it was given before. If None, another optimizer of the same module raises RuntimeError once
            it steps, unless the module was made before `import packsaddle`, copied or unpickled.
        outer: the step of the anchor. The outer optimizer, `OuterSGD()` or a function of the anchor's tensors that
            returns a torch optimizer, has the workers' mean update as its gradient. `OuterAgreement()` multiplies the
            mean update of each tensor by a factor that is larger the more the workers' updates differ. By default the
            mean update is subtracted.
        mean_momentum: c in [0, 1], the fraction of AdamW's first moments that is replaced by the direction of the
            workers' mean update after a round (see `local.moments`). It sends no additional bytes. The default is 0.5
            if an optimizer is Adam or a variant of Adam, none is Muon, and `outer` has no momentum. Otherwise the
            default is 0.
        overlap: inner steps during which an exchange runs, below `every`, or an `Overlap` with more settings.
        noise: the standard deviation of Gaussian noise added in each round, or a `Noise`.
        escape: the saddle escape check of the anchor, as an `Escape` whose intervals count rounds, or None for no
            check.
        keep_unsent: after a round continue at a - e, where a is the anchor and e this worker's error memory, as in CSER
            (Xie et al. 2020). With False workers continue at a, as in Algorithm 1 and DiLoCo, which had higher losses
            in our measurements.
        offload: keep the anchor, the error memory and the outer optimizer's state on the CPU.
        seed: seed of all shared randomness; identical on all workers.
        scaler: the GradScaler that steps the optimizer. Without it, the steps that the scaler skips on this worker are
            not counted, and workers' step counts may differ.
        warn_own_state: warn once if `model.state_dict()` is called while this worker's parameters differ from the
            anchor. Set it to False in a script in which each worker saves its own parameters.

    Construction is collective: every worker starts from rank 0's parameters. Weights may be loaded until the first
    step, on every worker. With a manager, the first step or `join` waits for the other workers instead, and a worker
    that joins later receives their anchor. Raises ValueError or TypeError for invalid arguments, and ValueError for
    arguments that differ between workers but must be equal. Raises RuntimeError if a launcher has set WORLD_SIZE above
    1 and there is no process group.

    A round in which a worker's update is not finite is rejected on all workers, and recorded in `skips`. That worker
    continues from the last round, with the non-finite entries of its optimizers' states cleared. NonFiniteError is
    raised after more than `max_skipped` consecutive rejected rounds.

    Steps raise RuntimeError if workers make different calls, or exchange after unequal numbers of steps. The first step
    raises RuntimeError if gradients are identical on all workers, which shows that they were exchanged already. Rank 0
    logs a warning if training ends with steps after the last round that were followed by no call of `flush` or
    `state_dict` and no use of the anchor.
    """

    @suggests(
        compression="compressor", H="every", sync_every="every", period="every", local_steps="every", group="workers",
        process_group="workers", manager="workers", weight="workers", outer_optimizer="outer", delay="overlap",
        fragments="overlap", optimizers="optimizer", error_feedback="compressor", decay="compressor",
    )  # fmt: skip
    def __init__(
        self,
        optimizer: Optimizer | Sequence[Optimizer],
        compressor: AnyCompression = Sign(per_tensor=True),  # noqa: B008 -- immutable
        *,
        every: Every = 8,
        outer: AnyOuter = None,
        mean_momentum: float | None = None,
        overlap: int | Overlap = 0,
        workers: AnyWorkers = None,
        noise: float | Callable[[int], float] | Noise = 0.0,
        escape: Escape | None = None,
        keep_unsent: bool = True,
        offload: bool = False,
        seed: int = 0,
        scaler: torch.amp.GradScaler | None = None,
        model: torch.nn.Module | None = None,
        warn_own_state: bool = True,
    ) -> None:
        # Check the arguments, and convert them to options.
        if isinstance(compressor, Optimizer):
            raise TypeError("several optimizers must be given as a list: LocalUpdates([muon, adamw])")
        self.optimizers = as_optimizers(optimizer)
        check_not_exchanged(self.optimizers)
        check_scaler(scaler)
        if not (model is None or isinstance(model, torch.nn.Module)):
            raise TypeError(f"model must be a torch Module or None, got {model!r}")
        self.options = options = LocalOptions.of(
            *(compressor, overlap, workers, noise, outer),
            every=every,
            mean_momentum=usual_fraction(self.optimizers, outer) if mean_momentum is None else mean_momentum,
            escape=escape,
            keep_unsent=keep_unsent,
            offload=offload,
            seed=as_seed(seed),
        )
        options.compression.at(0)

        # Collect the trained parameters, and the model's tensors that are not trained.
        named = named_parameters(self.optimizers, model)
        parameters = {name: p for name, p in named.items() if p.requires_grad}
        check_parameters(parameters)
        if model is not None:
            check_covers(parameters.values(), model)
        untrained = untrained_tensors(named, model)
        self.steps = 0  # inner steps, including those that a scaler skipped
        self._has_begun = False  # True if the first inner step has begun, or was skipped by a scaler

        # Make the fragments, the set of workers to exchange with, and the reactions to the end of a round.
        device = torch.device("cpu") if offload else local_part(next(iter(parameters.values()))).device
        kind: type[FixedWorkers] | type[ElasticWorkers] = FixedWorkers
        if isinstance(options.workers, Elastic):
            kind = ElasticWorkers
        to = kind.connect(options, device, is_split=any(map(is_split, parameters.values())))
        shards = Shards(parameters.values(), to.within)
        with torch.no_grad():
            self._fragments, part_of = partition(parameters, options, to.channel, device, shards)
        check_compressor(self._fragments, options.compression, stacklevel=4)
        self._whole = WholeAnchor(self._fragments, parameters)
        made = None if options.outer is None else OuterOptimizer(options.outer, self._whole.leaves())
        self.outer: Optimizer | None = None if made is None else made.optimizer
        self._workers: WorkerSet = kind(options, to, device, self._fragments, part_of, self.optimizers, made)
        self._reactions = Reactions(
            *(options, self.optimizers, self._fragments, to.channel, self.outer, shards, self._workers.begun_at),
            logs_clips=self._workers.logs_clips,
        )
        self._baseline = Baseline(parameters.values(), to.group.processes)
        parts = parameters, self._fragments, self._workers, made, self._reactions, self._baseline
        self.saved_state = saved_state(self, options, *parts)

        # Compare the arguments of all workers, and set the parameters to rank 0's. With a manager, a worker's arguments
        # are compared when it joins.
        same = equal_arguments(options, self.optimizers, self.outer, device)
        same |= {f"params[{i}]": f"{name} {list(p.shape)} {p.dtype}" for i, (name, p) in enumerate(parameters.items())}
        same |= {f"untrained[{i}]": f"{name} {list(p.shape)} {p.dtype}" for i, (name, p) in enumerate(untrained)}
        self._workers.start(self._reactions, same, parameters, untrained)
        self._set_anchor_before_first_step()

        # Register hooks that count the optimizers' steps, and objects that detect mistakes in the training script.
        register_exchange(self, (*self.optimizers, *([self.outer] if self.outer else [])))
        is_shared = self._workers.is_shared
        checks = model is None and is_shared
        others = OtherOptimizers(parameters.values(), self.optimizers, to.group, checks=checks, is_alone=not is_shared)
        unsent = UnsentSteps(self if self._workers.warns_at_end else None, self._whole.is_left)
        self._watches = Watches(others, unsent)
        if model is not None:
            StateDictWarning.remove_from(model)
            if warn_own_state and is_shared:
                StateDictWarning(model, self, LocalUpdates._is_off_anchor)
        # The parameters, with a record of when each was frozen, by id, and the device on which they are.
        self._parameters = list(parameters.values())
        self._trained = {id(each.parameter): each for part in self._fragments for each in part.trained}
        self._device = next(iter(parameters.values())).device
        self._has_graphs = has_graphs(self._device)
        self._attempts = Attempts(self.optimizers, scaler, self._before_step, self._attempted)

    # Methods that run at each inner step.

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer) -> None:
        self._check_closed("optimizer.step()")
        if self._has_graphs:
            check_not_capturing("optimizer.step()", self._device)
        note_step(self._watches.begin(optimizer, self._trained))
        self._set_anchor_before_first_step()
        self._has_begun = True
        if self._enter():
            self._attempts.are_discarded = True
            # Discard the gradients, which were computed before the other workers' parameters were loaded.
            for each in self._trained.values():
                each.parameter.grad = None

    @torch.no_grad()
    def _attempted(self) -> None:
        """Count an inner step, applied or skipped by a scaler; then run the rounds that are due."""
        # Run the checks of `_before_step` here too, since `_before_step` is not called for a step that a scaler skips.
        self._check_closed("optimizer.step()")
        self._watches.count()
        self._set_anchor_before_first_step()
        self._has_begun = True
        self._enter()
        self.steps += 1
        with self._without_autocast():
            self._workers.after_step(self.steps, self._parameters)
        self._watches.unsent.record(self.steps, exchanged=self._workers.exchanging)

    def _without_autocast(self) -> torch.autocast:
        """Return a context without autocast, in which the products of compressors would lose digits."""
        return torch.autocast(self._device.type, enabled=False)

    def _check_closed(self, call: str) -> None:
        if self._whole.open:
            raise RuntimeError(f"{call} within at_anchor(), which puts parameters back at its end")

    def _enter(self) -> bool:
        """Join the run, unless this worker has joined already. Returns True if it joined now. In that case, its
        parameters may have been replaced by those of the other workers. Returns False for a fixed set of workers, which
        have joined at construction."""
        entered = self._workers.enter()
        self.steps = max(self.steps, self._workers.steps)
        return entered

    @torch.no_grad()
    def _set_anchor_before_first_step(self) -> None:
        """Set the anchor (from which local updates are measured) to the current parameters if this worker has made no
        step and has not joined a run. This includes weights that were loaded after construction."""
        if self.steps == 0 and not self._has_begun and not self._workers.has_joined:
            self._whole.set_from_parameters()
            if self._reactions.escape is not None:
                self._reactions.escape.check.begin()

    def _check_between_steps(self, call: str) -> None:
        """Raise RuntimeError within `at_anchor`, or if one of several optimizers has made the current step and another
        has not. `call` is the name of the caller, for the message."""
        self._check_closed(call)
        if missing := self._attempts.missing():
            hint = "" if self._attempts.scaler else "; if a GradScaler has skipped it, pass scaler="
            raise RuntimeError(f"{call} must come between two steps, and {missing} has still to take its own{hint}")

    # Methods to join and to leave.

    @torch.no_grad()
    def join(self) -> None:
        """Wait for the other workers' next round, and load their averaged parameters. Call it before training, if
        workers join and leave (see `Elastic`).

        Without this call the worker joins at its first step, and discards the gradients of this step, which were
        computed at other parameters. Raises RuntimeError for a fixed set of workers.
        """
        self._check_closed("join()")
        self._set_anchor_before_first_step()
        self._elastic(_FOR_ELASTIC.format("join")).join()
        self.steps = max(self.steps, self._workers.steps)

    @torch.no_grad()
    def leave(self) -> bool:
        """Send this worker's pending updates, uncompressed, in one more round, and leave the run. Call it before the
        process ends, if workers join and leave (see `Elastic`) and the other workers continue.

        Returns True if the updates are sent. If the round is not committed within `Elastic.grace` seconds, the updates
        are lost; the method then logs an error and returns False. Raises RuntimeError for a fixed set of workers.
        """
        self._check_closed("leave()")
        return self._elastic(_FOR_ELASTIC.format("leave")).leave()

    def _elastic(self, otherwise: str) -> ElasticWorkers:
        """Return the workers, which join and leave. Raises RuntimeError with the message `otherwise` for a fixed set
        of workers."""
        if not isinstance(self._workers, ElasticWorkers):
            raise RuntimeError(otherwise)
        return self._workers

    def _fixed(self, otherwise: str) -> FixedWorkers:
        """Return the workers, a fixed set. Raises RuntimeError with the message `otherwise` if workers join and
        leave."""
        if not isinstance(self._workers, FixedWorkers):
            raise RuntimeError(otherwise)
        return self._workers

    # The anchor (parameters last agreed on by all workers), and updates that it does not include.

    @torch.no_grad()
    def wait(self) -> None:
        """Wait until the exchanges that run in the background have ended, so that `ledger` includes their bytes. The
        results of these exchanges are not applied here, but at the steps at which they are due. If a worker has several
        processes (a site), this method is collective over these processes, like every other method that waits for
        exchanges."""
        self._workers.wait()

    @torch.no_grad()
    def error(self) -> Tensor:
        """Return the mean over workers of their pending updates (see `pending`), weighted by `Workers.weight` if it is
        set, float[d]; collective.

        Without an outer optimizer, the anchor (the parameters last agreed on) minus error() changes as the parameters
        do in training without compression. d is the number of elements in this process's shards. Raises RuntimeError if
        workers join and leave (see `Elastic`): use `pending`.
        """
        workers = self._fixed("error is of workers that are all there; with a manager, pending() is this worker's own")
        return self._whole.joined(workers.mean(self._unapplied("error()"), self.steps))

    @torch.no_grad()
    def pending(self) -> Tensor:
        """Return this worker's updates that are still to be subtracted from the anchor, i.e. from the parameters on
        which all workers last agreed: float[d], in the optimizer's order.

        The updates are the error memory, the local update since the last exchange, and the update in a running
        exchange. This method waits for running exchanges.
        """
        return self._whole.joined(self._unapplied("pending()"))

    def _unapplied(self, call: str) -> list[Tensor]:
        self._check_closed(call)
        self._set_anchor_before_first_step()
        return self._workers.unapplied()

    def anchor(self) -> dict[str, Tensor]:
        """Return a copy of the anchor, the parameters last agreed on by all workers, as a dict by parameter name.

        If the optimizers have names of parameters, as after AdamW(model.named_parameters()), these names are used.
        Otherwise the names are those in `model`, if it was given, or else "parameter 0", "parameter 1" and so on. The
        tensors are at least float32 and have the shapes of this process's shards.
        """
        self._set_anchor_before_first_step()
        self._watches.unsent.clear()
        return self._whole.copy()

    def _is_off_anchor(self) -> bool:
        self._set_anchor_before_first_step()
        return self._whole.is_left()

    @contextmanager
    def at_anchor(self) -> Iterator[None]:
        """Context manager that sets the parameters to the anchor, on which all workers last agreed, and restores this
        worker's parameters at its end. Use it to evaluate, certify or save one model for all workers.

        Inside, optimizer steps and calls that read this worker's changes, such as `flush`, raise RuntimeError. The
        context manager is also a decorator, as in `@local.at_anchor()` above an evaluation function.
        """
        self._set_anchor_before_first_step()
        self._watches.unsent.clear()
        with self._whole.at_anchor():
            yield

    def state_dict_of(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """Return a copy of the model's `state_dict` with the anchor's parameters, on which all workers last agreed.

        The result is one model for all workers, which may be saved on rank 0. In contrast, `model.state_dict()` has
        this worker's own parameters. Tensors that `LocalUpdates` does not exchange, such as buffers, have this worker's
        values. Not collective.

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
        """Exchange all pending updates, after which all workers have the same parameters; collective.

        Call at the end of training. Running exchanges are applied first. Then pending updates of the whole model are
        exchanged without noise, and their mean is subtracted from the anchor (the parameters last agreed on); an outer
        optimizer is not used. The part of the updates that compression does not send stays in the error memories for
        later rounds. Returns True if all exchanges were applied. With a torchft Manager, a flush is an uncompressed
        round of all present workers, including workers that continue training.

        Args:
            compressor: the compressor of this exchange. The default is Rounded("int4"), which sends an eighth of the
                uncompressed bytes, if two conditions hold: the compressor of the last round sends no more bytes than
                Rounded("int4"), and `Compression` has the exchange "auto" (its default) or "two-way" and no `back`.
                Otherwise the exchange is uncompressed. With Identity() all updates are sent uncompressed, so error
                memories are 0 afterwards, except for the rest of clipped updates (see `Workers.clip`). Use Identity()
                before you freeze parameters.

        Parameters that were frozen at all steps since the last exchange keep their values and error memories. Raises
        TypeError if `compressor` is not a Compressor, and ValueError if it does not suit the model's size or differs
        between workers. Raises RuntimeError for a compressor with a torchft Manager.
        """
        self._check_between_steps("flush()")
        self._set_anchor_before_first_step()
        self._watches.others.check()
        self._watches.unsent.clear()
        with self._without_autocast():
            applied = self._workers.flush(compressor, self.steps)
        self._watches.others.flushed()
        # A worker that has joined within this call continues at the step count of the worker that sent its state.
        self.steps = max(self.steps, self._workers.steps)
        return applied

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Call `flush` if the block has ended without an exception."""
        if kind is None:
            self.flush()

    @torch.no_grad()
    def average(self, tensors: torch.nn.Module | Iterable[Tensor]) -> None:
        """Replace tensors with their means over workers; collective. The tensors are sent uncompressed. The means are
        weighted by `Workers.weight` if it is set.

        Use it for tensors computed from each worker's own parameters, which differ between workers even after `flush`:
        a module such as torch's AveragedModel, whose parameters and buffers are averaged, or tensors such as z of a
        schedule-free optimizer. Tensors that are not floating point are set to worker 0's.

        Raises TypeError for objects that are not tensors. Raises ValueError if workers pass tensors of different shapes
        or dtypes; the message names the first tensor that differs. Raises RuntimeError if workers join and leave, i.e.
        if a torchft manager is used.

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
        workers = self._fixed("average is for a fixed set of workers; with a manager, evaluate the anchor")
        workers.average(tensors, self.steps)

    # Methods for the saved state.

    def state_dict(self) -> dict[str, Any]:
        """Return this worker's state as a dict of tensors and plain types; collective if an exchange is in progress.

        It contains the anchor (the parameters on which all workers last agreed), the error memory, running exchanges,
        the outer optimizer's state and the counts. The parameters and the inner optimizers' states, which differ
        between workers, are not included: save them too, on every worker. Raises RuntimeError if one optimizer has made
        the current step and another has not.
        """
        self._check_between_steps("state_dict()")
        self._set_anchor_before_first_step()
        self.wait()
        self._watches.unsent.clear()
        return self.saved_state.save({"fragments": [{} for _ in self._fragments]})

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state`, a result of `state_dict` on this worker. Raises ValueError, with nothing changed, if `state`
        does not fit this object's options and parameters."""
        self._check_closed("load_state_dict()")
        self.saved_state.validate(state)
        self._workers.abandon()
        self._workers.steps = state["steps"]
        self.saved_state.load(state)
        self._attempts.restart()
        self._workers.resume(state)
        self._watches.unsent.clear()

    def check_call(self, call: Call) -> None:
        """Raise RuntimeError on all workers unless all of them are about to make this `call`, such as "saves a
        checkpoint". Collective; the bytes of this check are not counted in `ledger`. No-op if workers join and
        leave."""
        self._workers.check_call(call, self.steps)

    def weight_in(self, state: Mapping[str, Any]) -> float:
        # A state of an earlier format has no entry "share". Do not raise here, since `State.split` raises a clear error
        # for such a state.
        return float(state.get("share", 1.0))

    def for_resharding(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        return in_current_parts(state)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("LocalUpdates cannot be copied or pickled; use state_dict() and load_state_dict()")

    def __repr__(self) -> str:
        compressor = describe(self.options.compression.at(self.rounds))
        outer = type(self.outer).__name__ if self.outer else "mean"
        return (
            f"LocalUpdates({names_of(self.optimizers)}, every={self.options.every}, {compressor}, outer={outer}, "
            f"fragments={len(self._fragments)}, workers={self._workers.channel.group.size}, steps={self.steps}, "
            f"rounds={self.rounds})"
        )

    # Records. Reading a property changes nothing and is not collective.

    @property
    def _skips(self) -> Skips:  # type: ignore[override]
        return self._reactions.outcomes.skips

    @property
    def ledger(self) -> Ledger:
        """The bytes that this worker sent and received, by round and by purpose, such as "guard" for checks."""
        return self._workers.channel.ledger

    @property
    def rounds(self) -> int:
        """The number of applied exchanges, summed over fragments (parts of the model exchanged together)."""
        return sum(part.rounds for part in self._fragments)

    @property
    def clips(self) -> list[Clip]:
        """A record of each update, of any worker, that exceeded the limit `Workers.clip` and so was scaled down. The
        list has the records since construction, or since a saved state was loaded."""
        return self._reactions.clips.found

    @property
    def clipped(self) -> int:
        """The number of updates, of all workers, that exceeded the limit `Workers.clip` and so were scaled down. If a
        saved state was loaded, the number includes the updates that were clipped before the state was saved."""
        return self._reactions.clips.count

    @property
    def resets(self) -> list[Reset]:
        """A record of each time that the saddle escape check (lines 4-8 of Algorithm 1) fired. It contains the round,
        the reason, the compared losses, and the decision to keep or to roll back the anchor, i.e. the parameters on
        which all workers last agreed."""
        return self._reactions.resets

    @property
    def workers(self) -> int:
        """The number of workers. If workers join and leave, it is the number of workers in the last round."""
        return self._workers.workers

    @property
    def paces(self) -> list[int]:
        """The number of inner steps of each worker in a round, by rank. Each number is `every`, except with
        `Workers(weight="steps")`, where a faster worker makes more steps. If workers join and leave (see `Elastic`),
        the list has one entry: the number of steps that this worker makes from one round to the next."""
        return list(self._workers.paces)

    @property
    def position(self) -> int:
        """The number of inner steps of all workers whose updates are included in the anchor, i.e. in the parameters on
        which all workers last agreed. Workers that have left count too."""
        return self._workers.position(self.steps)

    @property
    def contraction(self) -> float | None:
        """The contraction 1 - ||v - C(v)||^2 / ||v||^2 at the last measurement, where v is this worker's update and C
        the compressor. It is None if there was no measurement (see `Compression.monitor_every`). The value is a mean
        over the measured fragments (parts of the model exchanged together)."""
        found = [part.contraction.whole for part in self._fragments if part.contraction.whole is not None]
        return sum(found) / len(found) if found else None

    @property
    def uncompressed(self) -> Bytes:
        """The bytes that a ring all-reduce of the gradients in each of the steps so far would have sent."""
        return self._baseline.bytes(self.steps, self._workers.channel.group.size)

    @property
    def exchanging(self) -> bool:
        """True if an exchange began after the last inner step, or, with `Workers(weight="steps")`, if that step ended a
        round; True equally often on all workers."""
        return self._workers.exchanging


_FOR_ELASTIC = "{} is for workers that come and go: LocalUpdates(..., workers=Elastic(...))"
