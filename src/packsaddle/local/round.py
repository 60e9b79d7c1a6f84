"""A round: one exchange of the local updates of a fragment (parameters exchanged together), as four functions in order.

    begin      v = decay f e + (s - x) + xi     x: this worker's parameters, which started at s
    exchange   q = C(p c v), m = mean of q      C: the compressor; m, the mean over W workers, is identical on all
    close      e <- v - q / p                   e: this worker's error memory; unchanged if the round is rejected
    apply      a <- outer step along m          a: the anchor, the parameters last agreed on, identical on all workers
               x <- s = a - e                   s = a with `keep_unsent=False`

The factors f, p and c are 1 unless workers have weights or clip. p = W w_i / sum_j w_j is the share of worker i with
weight w_i, f is the worker's former share of the mean over its present one (`Fragment.carried`), and c is at most 1
(`Workers.clip`). xi is the noise that escapes saddle points (`Noise`), 0 by default. If the round has a delay, x keeps
the progress that it makes between `begin` and `apply`.

`begin` returns a `Begun`, `exchange` makes a `Sent` of it, and `close` an `Ended`, which `apply` applies. The sets of
workers in `local.workers` and `local.elastic` call them. Only `exchange` is collective over the workers, except that
`close` gathers the reports of invalid values if a round is rejected and they are not gathered yet. Fixed workers call
`exchange` immediately, or in the background during the next steps. Elastic workers, which join and leave during
training, vote between `exchange` and `close` whether the round is committed or repeated.

A round is rejected, identically on all workers, if the v of one of them is invalid, i.e. non-finite or too large, or if
one of them received an invalid message. The rules of clipping, and of lengthening m where workers disagree, are at the
end of this file. In the code, a fragment is a set of parameters that are exchanged together, a worker is a replica of
the model and may have several processes, each with a shard of it, and in a two-way exchange a worker owns the
coordinates that it averages for all workers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.aggregators import Averaged
from packsaddle.comm.sharding import Shards
from packsaddle.compressors import Compressor
from packsaddle.feedback.report import Report
from packsaddle.feedback.round import Round
from packsaddle.feedback.state import check_tensor
from packsaddle.local.anchor import PseudoGradient
from packsaddle.local.fragment import Fragment
from packsaddle.numerics.devices import read, use_in_current_stream, wide, widened

_LEAST_CLIPPED = 3  # the number of updates from which on a median can tell an outlier


def share_of(weights: Sequence[float], rank: int) -> float:
    """Return the factor W w_i / sum_j w_j for worker i = `rank`, where w are the weights of the W workers, of which at
    least one is above 0. The plain mean of updates that are scaled by these factors is the weighted mean of the
    updates, that of federated averaging (McMahan et al. 2017, Algorithm 1)."""
    if len(set(weights)) == 1:
        return 1.0
    return len(weights) * weights[rank] / sum(weights)


# The three values of a round, at three times. A `Clip` is a record that a round leaves, and a `SavedExchange` the form
# of an `Ended` in a checkpoint.


@dataclass(frozen=True)
class Begun:
    """A round whose vector v is computed and not sent yet."""

    part: Fragment
    t: int  # index of the round, i.e. the number of applied rounds of the fragment before this one
    due: int  # the tick (see `Schedule`), or with elastic workers the step, after which the round is applied
    exchanging: Round  # the exchange of v as a transaction, with the error memory
    # Factor W w_i / sum_j w_j of this worker's v in the mean over the W workers, for weights w. If it is 0, the worker
    # receives the mean, but keeps its own update.
    share: float
    workers: int  # W
    # Factor of the error memory, which was made with another share of the mean if weights have changed since
    # (`Fragment.carried`).
    carried: float
    later: bool  # True if the exchange has a delay: `due` is later than the beginning
    flush: Compressor | None  # compressor of a flush (an exchange of all pending updates); None: no flush
    frozen: list[str]  # names of the parameters that are frozen on this worker
    # The values, one tensor per parameter, relative to which a parameter's change is kept when the round is applied:
    # with a delay, copies of the parameters at the beginning of the round; with share 0, copies of the start point.
    # Empty: no changes are kept.
    before: list[Tensor]
    norm: Tensor | None  # norm of this worker's own update in v, float32[1]; None: updates are not clipped

    @property
    def is_invalid(self) -> bool:
        """True if this worker's v is invalid. The host waits for the device."""
        return bool(self.exchanging.invalid)

    @property
    def is_lengthened(self) -> bool:
        """True if this round lengthens the mean update where the workers' updates disagree (see `OuterAgreement`)."""
        return self.part.options.agreement > 0 and self.flush is None


@dataclass(frozen=True)
class Sent:
    """A round whose v is sent and averaged. On a GPU the results may still be in computation."""

    begun: Begun
    # m, the mean update over workers. It is a vector, float[n], if a delay or an option requires one, and otherwise an
    # `Averaged`, which has the messages.
    mean: Averaged | Tensor
    factors: Tensor | None  # clipping factors of all workers' v, float64[W]; None: updates are not clipped
    residuals: dict[str, Tensor]  # residuals 0 - C(0) of this worker's frozen parameters, by name
    # By rank, each worker's report on its v and on the messages that it received. Empty if all are valid, or if the
    # reports are gathered by `close`.
    reports: list[Report]


@dataclass(frozen=True)
class Clip:
    """Record of one worker's update that was scaled down in an applied round, since its norm exceeded the limit that
    `Workers.clip` sets."""

    step: int  # index t of the round, counted per fragment (parameters exchanged together)
    worker: str  # rank of the worker; with elastic workers, the worker's name in hexadecimal
    factor: float  # scale factor of the update, in [0, 1)


@dataclass(frozen=True)
class Ended:
    """A round with its outcome. The error memory is committed or rolled back, and `apply` will move the anchor."""

    part: Fragment
    t: int
    due: int
    applied: bool  # True if the round is applied, False if it is rejected; identical on all workers
    invalid: bool  # True if the round is rejected and this worker's v was invalid
    mean: Averaged | Tensor | None  # m, or None if the round is rejected
    before: list[Tensor]
    frozen: list[str]
    agrees: bool  # True if the same parameters are frozen on all workers; the anchor of these then does not change
    is_flush: bool = False
    is_sent: bool = True  # False if this worker has only received the mean, since its weight is 0
    # True if the round is a flush that has not sent all of v. The parameters then move to the anchor, and not to the
    # start point.
    leaves_rest: bool = False
    reports: list[Report] = field(default_factory=list)  # by rank, see `Sent`; empty if all values are valid
    times: list[int] = field(default_factory=list)  # each worker's time of a step in nanoseconds, by rank; 0: unknown
    clips: list[Clip] = field(default_factory=list)  # the workers' updates that were scaled down in this round


@dataclass(frozen=True)
class SavedExchange:
    """An `Ended` that is not applied yet because of a delay, in the form in which a `state_dict` stores it."""

    due: int
    applied: bool
    invalid: bool
    reports: list[Report]
    start: dict[str, Tensor]  # `Ended.before`, by name
    mean: dict[str, Tensor]  # `Ended.mean`, by parameter; empty if the exchange was rejected
    frozen: list[str]
    agrees: bool
    times: list[int]
    clips: list[Clip]


# The four functions.


def begin(
    part: Fragment, due: int, weights: Sequence[float], *, later: bool = False, flush: Compressor | None = None
) -> Begun:
    """Compute the vector to send, v = decay f e + (s - x) + xi. Here e is the error memory, f is `Begun.carried`, x are
    the parameters, s is the point at which they continued after the last exchange, and xi is the noise.

    If v is invalid on a process of this worker, v is replaced by zeros on all of its processes. At frozen parameters v
    is 0.

    Args:
        part: the fragment (parameters exchanged together).
        due: the time of the schedule at which the round is applied, in ticks (see `Schedule`).
        weights: the weights of the workers in the mean, by rank, of which at least one is above 0. A worker with weight
            0 sends zeros, keeps its local update, and averages no chunk for the other workers in a two-way exchange.
        later: True if the round is applied at a later step. The changes that the parameters make until then are kept.
        flush: a compressor with which v is sent, without noise, in an exchange of all pending updates, after which the
            parameters of the workers with a weight above 0 are those of the anchor; None in other rounds.
    """
    options, t, rank = part.options, part.rounds, part.feedback.channel.group.rank
    noise = options.noise.drawn(seed=part.seed, step=t) if options.noise.std and not flush else None
    senders = None if all(weights) else [i for i, w in enumerate(weights) if w]
    part.use(options.compression.at(t) if flush is None else flush, owners=senders)
    for each in part.trained:
        each.begin_exchange()
    frozen = part.frozen_next
    part.anchor.subtract_owed()
    # Compute v. If this worker sends nothing, copy the start point, relative to which it keeps its whole update.
    share = share_of(weights, rank)
    before = [] if share else part.anchor.copy_starts()
    carried = part.carried(share / len(weights))
    exchanging = part.feedback.round(t)
    exchanging.correct(PseudoGradient(part.anchor, options.compression.decay * carried, noise, frozen))
    if later and share:
        before = [x.clone() for x in part.anchor.tensors()]
    begun = Begun(part, t, due, exchanging, share, len(weights), carried, later, flush, frozen, before, None)
    if options.workers.clip is None:
        return begun
    return replace(begun, norm=norm_of(_of_worker(begun, exchanging.v), part.shards.total))


def exchange(begun: Begun, step: int, norms: Tensor | None = None, *, reports: bool) -> Sent:
    """Send q = C(p c v), average q over the workers, and compute the residual v - q / p; collective. Here p is
    `Begun.share`, and c the factor that clips v. A worker whose share is 0 sends zeros, and has no residual.

    This function may run in another thread.

    Args:
        begun: the round.
        step: the step under which the ledger records the bytes.
        norms: `Begun.norm` of each worker, float32[W], by rank, as gathered by the caller. By these, v is clipped (see
            `factors_of`). None: v is not clipped.
        reports: gather the workers' reports of invalid values here, for which the host waits for the device. Otherwise
            `close` gathers them. If the host waits for collectives anyway, they must be gathered here: a collective
            from `close`, in the main thread, could overtake another fragment's exchange in the background.
    """
    part, exchanging, options = begun.part, begun.exchanging, begun.part.options
    part.feedback.channel.step = step
    factors = None
    if norms is not None and options.workers.clip is not None:
        factors = factors_of(norms, options.workers.clip)
    own_factor = None if factors is None else factors[part.feedback.channel.group.rank]

    def squares(sent: Tensor) -> Tensor:
        scale = begun.share * (1.0 if own_factor is None else own_factor.to(sent))
        return squares_of(part.views(_of_worker(begun, sent, scale)), begun.share)

    # Send q. The residual becomes the error memory once the round is closed.
    g = exchanging.exchange(weight=begun.share, clip=own_factor, measure=squares if begun.is_lengthened else None)
    residuals: dict[str, Tensor] = {}
    if begun.share:
        exchanging.absorb()
        # Zeros were sent for the frozen parameters, so their error memory must count in later rounds as it does now: it
        # is kept, except for the factor of changed weights.
        if begun.frozen:
            views = part.by_name(exchanging.v)
            residuals = {name: views[name].clone() for name in begun.frozen}
            part.feedback.memory.keep([part.names.index(name) for name in begun.frozen])
            for name in begun.frozen if begun.carried != 1.0 else ():
                views[name].mul_(begun.carried)
    # Store the mean as one vector if a delay or an option requires a vector. Otherwise the decoded messages are
    # subtracted from the anchor one after the other.
    as_vector = begun.later or options.outer is not None or options.mean_momentum > 0 or _averages_senders(part)
    mean = _vector(part, g) if as_vector or begun.is_lengthened else g
    return Sent(begun, mean, factors, residuals, _gather_reports(begun) if reports else [])


def close(sent: Sent, *, agrees: bool, names: Sequence[str] = (), times: Sequence[int] = ()) -> Ended:
    """Read whether the round is applied or rejected, and commit or roll back the error memory: e becomes v - q / p, or
    stays as it was. A worker whose share is 0 keeps its error memory in any case. The mean update is lengthened if the
    options ask for it (see `OuterAgreement`), and is set to 0 at parameters that all workers have frozen.

    Args:
        sent: the round.
        agrees: True if the same parameters are frozen on all workers.
        names: the names of the workers in records of clipped updates, by rank. If empty, ranks are their names.
        times: nanoseconds per inner step of each worker, by rank.
    """
    begun, part, exchanging = sent.begun, sent.begun.part, sent.begun.exchanging
    mean, factors = sent.mean, sent.factors
    if isinstance(mean, Tensor) and mean.device.type != "cpu":
        use_in_current_stream(mean)
    # Read the verdict and, if updates are clipped, the clipping factors, for which the host waits once.
    verdict = exchanging.verdict
    if factors is None:
        applied = verdict.read()
    else:
        *numbers, found = read(*verdict.tensors(), factors)
        factors, applied = torch.tensor(found, dtype=factors.dtype), verdict.settle(*numbers)
    # An invalid message may reach only one process of this worker. So the processes reject the round if one of them
    # does.
    applied = not part.shards.any(not applied, exchanging.invalid.device)
    reports = sent.reports or _gather_reports(begun)
    _exclude_frozen(sent, agrees=agrees)
    if applied and begun.is_lengthened:
        _lengthen(sent)
    # Commit the new error memory, or roll it back.
    commit = applied and begun.share > 0
    moves_frozen = not agrees or begun.carried != 1.0
    with part.anchor.fixed_update(begun.frozen if moves_frozen else []):
        _settle(begun, commit=commit)
    own = 1.0 if factors is None else float(factors[part.feedback.channel.group.rank])
    leaves_rest = begun.flush is not None and begun.share > 0 and (not begun.flush.lossless or own < 1)
    return Ended(
        *(part, begun.t, begun.due, applied, not applied and begun.is_invalid, mean if applied else None),
        *(begun.before, begun.frozen, agrees),
        is_flush=begun.flush is not None,
        is_sent=begun.share > 0,
        leaves_rest=leaves_rest,
        reports=reports,
        times=list(times),
        clips=[] if factors is None or not applied else clips_of(begun.t, factors, names),
    )


def apply(ended: Ended, outer: Optimizer | None) -> None:
    """Apply the mean update of an ended round to the anchor, by a step of `outer` if it is given, and move the
    parameters x to the new start point.

    If the round was rejected, the anchor does not change. A worker whose update was invalid then resets x to the point
    at which it continued after the last exchange; on the other workers x does not change either.
    """
    part, anchor = ended.part, ended.part.anchor
    if not ended.applied:
        if ended.invalid:
            anchor.move_to_start()
        return
    assert ended.mean is not None
    part.rounds += 1
    # A flush includes fewer inner steps than a round, or none. So its mean is subtracted without the outer optimizer,
    # whose momentum would move the anchor as far as after a whole round.
    outer, mean = None if ended.is_flush else outer, ended.mean
    if outer is not None and part.options.mean_momentum and isinstance(mean, Tensor):
        # Pass a copy, since torch's foreach SGD changes its gradients in place, and `mean_momentum` uses the mean
        # afterwards.
        mean = mean.clone()
    with anchor.fixed_update([] if ended.agrees else ended.frozen):
        anchor.apply_mean(mean, outer, ended.frozen if ended.agrees else None)
    # A flush that has sent all of v leaves a residual only if v was multiplied by a weight. The residual is then a
    # rounding error, so clear it.
    if ended.is_flush and ended.is_sent and not ended.leaves_rest:
        for name, e in part.by_name(part.feedback.memory.vector).items():
            if name not in ended.frozen:
                e.zero_()
    anchor.move(ended.before, ended.frozen)
    if ended.leaves_rest:
        anchor.move_to_anchor()


# What else can be done with a round.


def roll_back(running: Begun | Sent) -> None:
    """Cancel a round that has not ended. The error memory is rolled back to its value before the round."""
    _settle(running.begun if isinstance(running, Sent) else running, commit=False)


def unapplied(part: Fragment, ended: Ended | None, weight: float) -> Tensor:
    """Return the updates of this worker that the anchor, on which all workers last agreed, does not include yet,
    float[n]. `ended` is the fragment's round that is not applied yet, if there is one. Its mean update of all workers
    is included, in place of what this worker has sent. `weight` is the part that this worker has in the mean (see
    `Fragment.unapplied`)."""
    if ended is None or not ended.applied:
        return part.unapplied(weight)
    assert isinstance(ended.mean, Tensor)
    starts = zip(part.names, part.anchor.starts(), ended.before, strict=True)
    starts_then = [start if name in ended.frozen else before for name, start, before in starts]
    return part.anchor.add_local_update(part.unsent(weight).add_(ended.mean), starts_then)


def saved(ended: Ended) -> SavedExchange:
    part = ended.part
    start = {place.name: s for place, s in zip(part.places, ended.before, strict=True)}
    mean = part.by_name(ended.mean) if isinstance(ended.mean, Tensor) else {}
    outcome = ended.due, ended.applied, ended.invalid, list(ended.reports)
    return SavedExchange(*outcome, start, mean, ended.frozen, ended.agrees, ended.times, ended.clips)


def check_saved(part: Fragment, exchange: SavedExchange) -> None:
    """Raise ValueError if the saved round does not fit the fragment `part`."""
    for kind, vector in {"start": exchange.start, **({"mean": exchange.mean} if exchange.applied else {})}.items():
        for place in part.places:
            check_tensor(f"{kind} of {place.name}", vector.get(place.name), place.parameter.shape)


def loaded(part: Fragment, exchange: SavedExchange) -> Ended:
    """Return a round of the fragment `part` from its saved form. Call after the fragment's number of rounds is
    loaded."""
    mean = None
    if exchange.applied:
        mean = part.zeros().flat
        for name, view in part.by_name(mean).items():
            view.copy_(exchange.mean[name])
    here = zip(part.places, part.anchor.tensors(), strict=True)
    return Ended(
        *(part, part.rounds, exchange.due, exchange.applied, exchange.invalid, mean),
        *([exchange.start[place.name].to(x, copy=True) for place, x in here], exchange.frozen, exchange.agrees),
        reports=exchange.reports,
        times=exchange.times,
        clips=exchange.clips,
    )


# Parts of the four functions.


def _settle(begun: Begun, *, commit: bool) -> None:
    """End the exchange of v: commit the new error memory, or roll it back. It is also rolled back if this worker has
    share 0, in a round that is applied."""
    part = begun.part
    begun.exchanging.close(apply=commit)
    if commit:
        part.note_made(begun.share / begun.workers)
        # The vector v, which was sent, included `owed` (see `Anchor.owed`), except for frozen parameters. So clear
        # `owed`.
        part.anchor.clear_owed(begun.frozen)
    else:
        for each in part.trained:
            each.cancel_exchange()
    part.contraction.close(begun.t, apply=commit)


def _of_worker(begun: Begun, v: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Return the part of the vector `v`, float[n], that is this worker's own update.

    In a two-way exchange, at the coordinates that the worker owns, i.e. averages for all workers, v also includes decay
    f e. At these coordinates e is the residual of a mean, which belongs to the updates of all workers. So scale * decay
    f e is subtracted there, where `scale` is the factor by which `v` was scaled, except at frozen parameters, whose v
    has no e.
    """
    part, owned = begun.part, begun.part.feedback.owned
    if owned.start == owned.stop:
        return v
    own, sent = v.clone(), part.by_name(v)
    own[owned] -= scale * part.options.compression.decay * begun.carried * part.feedback.memory.vector[owned]
    for name in begun.frozen:
        part.by_name(own)[name].copy_(sent[name])
    return own


def _vector(part: Fragment, g: Averaged) -> Tensor:
    """Return the mean update over workers, whose terms `g` has, as one vector, float[n]. With exchange="senders", each
    coordinate is averaged only over the workers that sent it."""
    n, total = part.compressed_d, g.write_to(part.zeros().flat)
    if _averages_senders(part) and len(g.mean) > 1:
        counts = torch.zeros_like(total[:n])
        for term in g.mean:
            sent = term.compressor.support_of(term.message, n)
            counts.add_(1.0) if sent is None else counts.index_add_(0, sent, torch.ones_like(counts[: len(sent)]))
        total[:n].mul_(len(g.mean) / counts.clamp_(min=1.0))
    return total


def _averages_senders(part: Fragment) -> bool:
    return part.options.compression.exchange == "senders"


def _gather_reports(begun: Begun) -> list[Report]:
    """Return the reports of all workers, by rank, if the v or a message of at least one worker is invalid, and
    otherwise []; collective. A report names the first invalid parameter or message of its worker."""
    exchanging = begun.exchanging
    # `verdict.fraction` is the fraction of workers whose v is invalid, or NaN if a message is invalid.
    if exchanging.verdict.fraction == 0:
        return []
    report, where = str(exchanging.full_report()), exchanging.invalid.device
    return list(map(Report.read, begun.part.feedback.channel.gather_text(report, where, "guard")))


def _exclude_frozen(sent: Sent, *, agrees: bool) -> None:
    """Exclude the parameters that are frozen on this worker from a completed exchange.

    If the same parameters are frozen on all workers, their mean update is set to 0, so that the anchor (the parameters
    last agreed on) keeps their values. Otherwise the mean update includes C(0), which this worker has sent for the
    frozen parameters, so the residual 0 - C(0) is added to their error memory.
    """
    part, frozen = sent.begun.part, sent.begun.frozen
    if not frozen:
        return
    if not agrees:
        views = part.by_name(sent.begun.exchanging.v)
        for name, residual in sent.residuals.items():
            views[name].add_(residual)
    elif isinstance(sent.mean, Tensor):
        mean = part.by_name(sent.mean)
        for name in frozen:
            mean[name].zero_()


def _lengthen(sent: Sent) -> None:
    """Lengthen the mean update of each tensor whose updates differ between workers, in place (see
    `OuterAgreement`)."""
    assert isinstance(sent.mean, Tensor)
    part, measured = sent.begun.part, sent.begun.exchanging.measured
    if measured.device.type != "cpu":
        use_in_current_stream(measured)
    workers = part.feedback.channel.group.size
    lengthen(part.views(sent.mean), measured, part.options.agreement, workers, part.shards)


# Agreement of workers: the more the workers' updates of a tensor differ, the more their mean is lengthened.
#
# The noise of the workers' gradients cancels in their mean D = sum_i w_i q_i (weights w_i with sum 1, q_i the decoded
# messages), so D has a smaller norm than the updates q_i. With the exponent p in [0, 1] (see `OuterAgreement`), D is
# multiplied by
#
#     r^p,    r^2 = sum_i w_i norm(q_i)^2 / norm(D)^2,    r clamped to [1, sqrt(W)],
#
# for each tensor separately. W is the number of workers. r is 1 if all workers send the same update, and sqrt(W) if W
# updates of equal norm are orthogonal. Each worker adds the numbers w_i norm(q_i)^2 to the uncompressed part of an
# exchange, four bytes per tensor. The rule is ours, measured in experiments/nanogpt.


def squares_of(sent: Sequence[Tensor], share: float) -> Tensor:
    """Return W w_i norm(q_i)^2 for each tensor, float[number of tensors]. The mean of this result over the workers is
    the weighted mean of the squared norms of their updates.

    W is the number of workers, w_i the worker's weight in the mean, and q_i its decoded update. `sent` has the tensor
    W w_i q_i for each tensor of the model, and `share` is W w_i. If this worker is not in the exchange, `share` and the
    result are 0.
    """
    norms = torch.stack([torch.linalg.vector_norm(tensor) for tensor in sent])
    return norms.square() / share if share else torch.zeros_like(norms)


def lengthen(means: Sequence[Tensor], squares: Tensor, p: float, workers: int, shards: Shards) -> None:
    """Multiply the mean update of each tensor by r^p, in place. Collective over the processes that have shards of this
    worker's tensors.

    `means` has the mean update of each tensor. r is the root mean square of the norms of the workers' updates, divided
    by the norm of the mean update. It is clamped to [1, sqrt(workers)]. `squares`, float[number of tensors], is the
    mean over workers of the result of `squares_of`. A mean update of zeros does not change.
    """
    of_mean = torch.stack([torch.linalg.vector_norm(mean) for mean in means]).square()
    both = shards.total(torch.stack([squares.to(of_mean), of_mean]))
    ratio = (both[0] / both[1]).nan_to_num(1.0).clamp(1.0, workers).sqrt()
    for mean, factor in zip(means, ratio**p, strict=True):
        mean.mul_(factor)


# Clipping: a worker's update v is multiplied by a factor c, so that its norm is at most `Workers.clip` times the median
# norm of all workers' updates. What was not sent stays in the worker's error memory, so no update is lost.


def norm_of(v: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the norm of a worker's update, float32[1]. `v`, float[n], is this process's part of the update, and
    `total` sums a tensor over the processes of the worker."""
    norm: Tensor = torch.linalg.vector_norm(v, dtype=wide(v.device)).reshape(1)
    return total(norm.square_()).sqrt_().float()


def factors_of(norms: Tensor, most: float) -> Tensor:
    """Return the factor by which each worker's update is scaled, float64[W]. It is min(1, most m / norm).

    `norms`, float32[W], has the norm of each worker's update, by rank, and NaN for a worker without an update. `most`
    is the limit on a norm as a multiple of m, the median of the norms above 0. For an even number of norms, m is the
    lower of the two middle norms, so that half of the workers cannot raise it. With fewer than three norms above 0, all
    factors are 1, since a median of one or two updates says nothing about an outlier.
    """
    norms = widened(norms)
    moves = norms > 0
    limit = most * torch.where(moves, norms, torch.nan).nanmedian()
    factors: Tensor = torch.where((norms > limit) & (moves.sum() >= _LEAST_CLIPPED), limit / norms, 1.0)
    return factors


def clips_of(t: int, factors: Tensor, names: Sequence[str]) -> list[Clip]:
    """Return a record of each update that was scaled down in the round with the index `t`. `factors`, float64[W], are
    the factors of all workers' updates, and `names` the workers' names. If `names` is empty, ranks are used."""
    named = zip(names or map(str, range(len(factors))), factors.tolist(), strict=True)
    return [Clip(t, name, s) for name, s in named if s < 1]
