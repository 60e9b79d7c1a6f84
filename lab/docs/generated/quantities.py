"""The names, units and meanings of the numbers that a run, a certificate, a logger and a ledger record.

The documentation's tables are made from these lists, and tests compare the lists with the files of runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Quantity:
    """One number, or several that are explained together."""

    keys: tuple[str, ...]
    meaning: str
    unit: str = ""
    optional: bool = False  # True: the number is missing in some runs


def _of(keys: str, meaning: str, unit: str = "", *, optional: bool = False) -> Quantity:
    return Quantity(tuple(keys.split()), meaning, unit, optional)


METRICS = (
    _of("step epoch", "steps taken; passes of all workers together over the training data"),
    _of(
        "loss",
        "training loss of the mini-batches, averaged over the steps that workers took since the last line, NaN if they "
        "took none; with [local] at each worker's own parameters",
    ),
    _of(
        "grad_norm",
        "norm of a worker's stochastic gradient (without noise and error memory), averaged in the same way; in a "
        "--fused run that of the mean gradient",
    ),
    _of("payload", "messages of this worker (rank 0) so far, without the purpose start", "bytes"),
    _of("sent received", "on its wire, forwarding included, without start; 0 with one worker", "bytes"),
    _of("seconds", "since the first step, certificates and tests excluded", "s"),
    _of("test_loss test_accuracy", "on lines with a test (test_every)", optional=True),
    _of(
        "rounds",
        "exchanges so far that were not skipped: steps, or with [local] exchanges of fragments, including those at "
        "the end",
    ),
    _of("resets", "resets by the escape check so far"),
    _of("skipped", "steps (with [local] rounds) skipped so far because a worker's gradient was not finite"),
    _of(
        "mu mu_by_tensor",
        "measured contraction 1 - ||v - C(v)||^2 / ||v||^2 of rank 0's last step, whole and by parameter; with "
        "[local] of its last round, whole",
        optional=True,
    ),
)
SUMMARY = (
    _of("label workers steps seconds", "the run's name, workers, steps and seconds"),
    _of(
        "final_loss", "training loss of the mini-batches, averaged over the steps taken in the last epoch, NaN if none"
    ),
    _of("test_loss", "over the test set, at the end"),
    _of("test_accuracy", "of classifiers; of text the share of next characters predicted", optional=True),
    _of("parameters compressed_parameters", "d, and the number of compressed coordinates"),
    _of("mu", "effective contraction: 1 - E||v - C(v)||^2 / ||v||^2 for a vector of even energy, dense part included"),
    _of("exchange exchange_reason", "the way messages were averaged, and the reason"),
    _of("rounds", "exchanges that were not skipped"),
    _of("local", "the settings of [local]", optional=True),
    _of(
        "elastic",
        "with --elastic, where each worker has its own summary and losses: `workers` of the last round; steps and "
        "epochs are those of all workers that there were",
        optional=True,
    ),
    _of("payload sent received", "as in metrics.jsonl, with the purpose start", "bytes"),
    _of("bytes_by_purpose", "the ledger's totals", "bytes"),
    _of(
        "compression",
        "bytes of uncompressed SGD's gradients (4 d a step) over the bytes of this run's messages of every purpose but "
        "start, metrics, buffers and guard",
    ),
    _of(
        "skipped warnings",
        "reports of the guards: skipped steps, warnings about the effective step",
    ),
    _of(
        "noise",
        "the last check of artificial noise, before step `step`: `r`; `walk`, the distance that noise moves x over the "
        "run (eta r sqrt(T) a coordinate) over the root mean square of x_0; `suggested`, the r for which that is 3; "
        "`times`, r sqrt(d) over the mini-batches' own noise `std` = sqrt(E||g - grad f||^2) of the mean of `workers` "
        "batches, with its standard error `std_error`; `per_example`, `error`, `batch_size`, `batches`, `d` (see "
        "packsaddle.GradientNoise). Those of the gradient are missing with batch normalization",
    ),
    _of("resets", "every reset by the escape check: step, reason, distance, the two objectives, committed or not"),
)
CERTIFICATE = (
    _of(
        "verdict headline",
        "saddle, second-order stationary, gradient too large, undecided; without epsilon not a minimum, no negative "
        "curvature, undecided; headline: the verdict and what it rests on, in words",
    ),
    _of(
        "loss grad_norm grad_norm_error",
        "of the mean loss over `examples`; the gradient's standard error if they are a sample",
    ),
    _of(
        "lambda_min_lower lambda_min_upper lambda_max_lower lambda_max_upper",
        "bounds on the Hessian's smallest and largest eigenvalue; each outer one may fail with the failure probability",
    ),
    _of("failure_probability", "of each of these bounds"),
    _of(
        "residual",
        "||H v - lambda v|| of the escape direction v, whose Rayleigh quotient is the upper bound on the smallest "
        "eigenvalue",
    ),
    _of(
        "threshold epsilon hessian_lipschitz",
        "-sqrt(rho epsilon), epsilon, rho; the first two are null if no epsilon was given",
    ),
    _of("hessian_lipschitz_estimated", "true if rho was measured along v, an estimate from below"),
    _of("slope", "<grad f, v>"),
    _of(
        "escape_distance escape_loss",
        'of a saddle, or of "not a minimum": the s with the lowest f(x + s v) found, and that loss',
    ),
    _of("escape_bend", "of the same: the largest amount found by which [f(x + s v) + f(x - s v)] / 2 is below f(x)"),
    _of("ritz_values ritz_shares", "the Ritz values, and the share of the random start along each"),
    _of(
        "saddle_below_rho",
        "for a rho below it the point would be a saddle; null without epsilon, or if no negative curvature was found",
    ),
    _of(
        "lr escape_steps",
        "the step size, over 1 - momentum, and the steps in which SGD's distance along v grows tenfold",
    ),
    _of("smallest_epsilon", "the smallest epsilon for which the point would be certified with this rho"),
    _of(
        "examples sample_of loss_name",
        "the examples of the Hessian, the number they were drawn from, and both in words",
    ),
    _of(
        "precision hvp hvp_reason hvp_error hvp_step",
        "of the Hessian-vector products: precision, method and its reason, error, and the step of differences",
    ),
    _of("hvps backward_passes", "the number of products, and of backward passes over the examples"),
    _of("bytes_sent", "by this worker", "bytes"),
    _of("seconds", "of this worker", "s"),
)
PURPOSES = (
    _of("start", "rank 0's parameters (behind a hook DDP sends them), and the comparison of the workers' arguments"),
    _of("values indices", "the sent coordinates and their positions; of LocalUpdates.flush the pending updates"),
    _of("scales unit", "of rounded values: the scale of each block, and the largest scale"),
    _of("signs levels sketch left right", "messages of Sign, QSGD, sketches and projections, and LowRank"),
    _of("sizes padding", "lengths of messages of variable length, and padding to equal length"),
    _of("dense", "tensors that are sent uncompressed"),
    Quantity(("escape norm", "objective", "reset"), "the escape check; reset is the mean error, at a commit"),
    Quantity(("batch norm", "buffers"), "statistics over all workers; running statistics, before tests"),
    _of("metrics", "the averages of the lines of metrics, and with [local] the votes on when to save"),
    _of("inspection", "opt.error(), opt.corrected()"),
    _of("guard", "comparisons of parameters and of numbers of steps; reports of gradients that are not finite"),
    _of("members", "the list of workers in a round of workers that join and leave"),
)
LOGGED = (
    _of(
        "steps skipped",
        "exchanges so far: completed, and skipped because a worker's gradient was not finite; of local updates the "
        "inner steps, and the skipped rounds",
    ),
    _of("rounds", "of local updates: exchanges so far, one for each fragment", optional=True),
    _of("resets", "of local updates: resets by the escape check so far", optional=True),
    _of("clipped", "of local updates: updates of all workers so far that `Workers.clip` has clipped", optional=True),
    _of("pace", 'of local updates with weight="steps": inner steps of worker 0 in a round', optional=True),
    _of("sent received", "on this worker's wire so far, forwarding included", "bytes"),
    _of("sent_in_step", "the part of it in the last step; not of local updates", "bytes", optional=True),
    _of(
        "reduction",
        "the bytes of DistributedDataParallel alone in the same number of steps (hook.uncompressed, a ring all-reduce) "
        "over sent",
    ),
    _of(
        "mu",
        "measured contraction of this worker's compressed vector at the last measurement (monitor_every)",
        optional=True,
    ),
)
FILES: Mapping[str, Sequence[Quantity]] = {
    "metrics.jsonl: one line per log_every steps": METRICS,
    "summary.json": SUMMARY,
    "certificates.jsonl and python -m lab certify --json": CERTIFICATE,
    "In loggers": LOGGED,
    "Purposes in the ledger": PURPOSES,
}
