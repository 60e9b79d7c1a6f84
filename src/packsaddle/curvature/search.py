"""The search for a Hessian eigenvalue below a threshold: found on a few examples, proved on all.

The threshold is -sqrt(rho epsilon), where epsilon is the threshold for the gradient norm and rho the Lipschitz constant
of the Hessian. If no epsilon is given, the threshold is 0.

A Rayleigh quotient below the threshold, over all examples, proves that an eigenvalue is below it, no matter how its
direction was found. So Lanczos first searches a sample of the examples, where Hessian-vector products are cheap, and
one product over all examples proves what it found. If it proves nothing, a sample four times as large is searched. That
no eigenvalue is below the threshold follows from the lower bound of `lanczos`, for which all Lanczos steps must be over
all examples. What they will cost follows from the sample.
"""

import math
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from packsaddle.curvature.certificate import Verdict, judge, threshold_of
from packsaddle.curvature.differences import Differences
from packsaddle.curvature.lanczos import Lanczos, Ritz
from packsaddle.curvature.mean_loss import MeanLoss
from packsaddle.curvature.options import Search
from packsaddle.curvature.products import Products
from packsaddle.curvature.progress import Reporter, Stopped

_LONGEST_WALK = 12  # maximum number of distances at which the loss is evaluated along a direction
_LEAST, _MOST = 256, 32  # the first sample has at least N / 256 of the N examples, and at most N / 32
_FEWEST = 16  # smallest number of examples in a sample
_GROWTH = 4  # ratio of the sizes of two consecutive samples
_SETTLED = 0.1  # relative residual to which a direction that was found on a sample is refined

# (distance s, loss f(x + s v)), ascending
Losses = tuple[tuple[float, float], ...]


class CurvatureSearch:
    """A search for negative curvature of the Hessian, by the Lanczos method on the Hessian-vector products `products`.

    `run` does the search, and `prove` tests a given direction. Both store their results as attributes.

    Args:
        products: Hessian-vector products over the examples that are searched.
        epsilon: threshold for the gradient norm; None: the verdict is only on the sign of lambda_min.
        rho: the Lipschitz constant of the Hessian; None: measured along the direction found.
        options: limits and tolerances of the search.
        report: where progress is reported.
    """

    def __init__(
        self, products: Products, epsilon: float | None, rho: float | None, options: Search, report: Reporter
    ) -> None:
        self.products, self._epsilon, self._given_rho = products, epsilon, rho
        self._options, self._report = options, report
        # The relative residual to which the direction of a saddle is refined, and the most steps that this may take.
        self._tolerance, self._patience = options.tolerance, math.inf
        self._found_at: int | None = None  # number of the first step whose direction proved a saddle
        self.rho = rho  # the Lipschitz constant of the Hessian; None: neither given nor measured yet
        self.lower, self.upper = -math.inf, math.inf  # bounds on the smallest eigenvalue
        self.lambda_max = -math.inf, math.inf  # bounds on the largest eigenvalue
        self.v: Tensor | None = None  # unit vector of the smallest curvature found, float64[d]
        self.residual = math.inf  # ||H v - (v^T H v) v||
        self.error = 0.0  # error of a product with a unit vector, included in the bounds
        self.verdict = Verdict.UNDECIDED  # on the curvature, if the gradient is at most epsilon
        self.lanczos: Lanczos | None = None
        self.ritz: Ritz | None = None  # of the last Lanczos step; None: no step was done
        self.is_stopped = False  # True if Ctrl-C or the limit on the time ended the search

    @property
    def loss(self) -> MeanLoss:
        return self.products.curvature

    def over(self, part: MeanLoss) -> "CurvatureSearch":
        """Return a search of the same question over a part of the examples.

        It refines its direction, which must prove a saddle on all examples too, for no longer than one product over all
        examples takes.
        """
        few = CurvatureSearch(self.products.over(part), self._epsilon, self._given_rho, self._options, self._report)
        few._tolerance, few._patience = _SETTLED, self.loss.examples / part.examples
        return few

    def run(self, seconds: float = math.inf) -> None:
        """Do Lanczos steps from a random start vector until the verdict is decided, and store the results.

        Let v be the Ritz vector of the smallest Ritz value. For a verdict that rests on negative curvature, the steps
        also continue until the residual of v is within `tolerance`. If no epsilon is given, they continue until v is
        nearly an eigenvector. They end in any case after `max_hvps` steps, when the Krylov space is exhausted, and
        after Ctrl-C or this number of seconds.
        """
        try:
            self._run(seconds)
        except Stopped:
            self._stop()

    def _run(self, seconds: float) -> None:
        most, measured_at = self._options.max_hvps, 0
        self.lanczos = lanczos = self._from_random_vector()
        for k in range(1, most + 1):
            # Each step replaces the bounds. The new ones are never worse than the old ones, except by rounding.
            self.ritz = ritz = lanczos.step()
            self._bound(ritz)
            self.upper = ritz.theta_min + ritz.rounding
            threshold = None if self.rho is None else threshold_of(self._epsilon, self.rho)
            self._report.bounds((self.lower, self.upper), self.lambda_max, threshold)
            last = k == most or lanczos.exhausted
            if not last and self._must_stop(seconds):
                raise Stopped

            # If rho is not given, measure it as soon as the Ritz vector is nearly an eigenvector, and again along the
            # final direction v.
            if self._given_rho is None and not measured_at:
                if not (last or ritz.is_settling):
                    continue
                self.rho, measured_at = self.products.rho(lanczos.ritz_vector()), k
            if not (last or self._settled(ritz)):
                continue
            if self._given_rho is None and measured_at < k:
                self.rho, measured_at = max(self.rho or 0.0, self.products.rho(lanczos.ritz_vector())), k

            # Decide the verdict. It is certain if v^T H v is below the threshold, or if the lower bound on lambda_min
            # is not below it.
            if last or self._settled(ritz):
                self._measure_direction(ritz, lanczos.ritz_vector())
                if last or self.verdict is not Verdict.UNDECIDED or not ritz.orthogonal:
                    break

    def prove(self, few: "CurvatureSearch") -> bool:
        """Return True if the direction v that was found by `few`, the search of a sample, proves negative curvature
        below the threshold, by its Rayleigh quotient over the examples of this search.

        The error of the quotient is assumed to be at least that of the products of `few`. If rho is not given, it is
        that of the sample. If that proves nothing, rho is measured over all examples.
        """
        assert few.v is not None
        self.v, self.rho = few.v, few.rho
        quotient, measured = self._measure_quotient(self.v, self.products.for_proof)
        self.error = max(few.error, measured)
        self.upper = quotient + self.error
        self.verdict = self._judged(self.upper)
        if self._given_rho is None and self.upper < 0 and not self.verdict.rests_on_negative_curvature:
            self.rho = self.products.rho(self.v)
            self.verdict = self._judged(self.upper)
        return self.verdict.rests_on_negative_curvature

    @property
    def sharpest(self) -> Tensor | None:
        """The unit Ritz vector of the largest Ritz value, float64[d].

        It is None if fewer than two products were computed, or if not all Lanczos vectors were stored.
        """
        if self.lanczos is None or self.ritz is None or not self.ritz.orthogonal or self.ritz.steps == 1:
            return None
        return self.lanczos.ritz_vector(largest=True)

    def walk(self, v: Tensor) -> Losses:
        """Return the loss f at x + s v and x - s v for increasing distances s.

        Here x are the parameters, and v is the direction of negative curvature. The first s is max(1, ||x||) / 1000 or
        less, and each further s is four times the last one. The walk ends after 12 distances, or at the first s of at
        least max(1, ||x||) / 100 where neither loss is below that at the last s.

        Let lambda < 0 be the curvature along v, and rho the true Lipschitz constant of the Hessian. At any s from
        |lambda| / (2 rho) to four times that, f(x) - [f(x + s v) + f(x - s v)] / 2 is at least |lambda|^3 / (10 rho^2).
        """
        loss, found = self.loss, dict[float, float]()
        reach, last = max(1.0, loss.size_of_parameters()), (loss.loss, loss.loss)
        s = min(abs(self.upper) / (2 * self.rho), 1e-3 * reach) if self.rho else 1e-3 * reach
        for _ in range(_LONGEST_WALK):
            found[s], found[-s] = sides = loss.loss_at(v, s), loss.loss_at(v, -s)
            # The walk does not stop at distances below max(1, ||x||) / 100, where the loss may rise by rounding alone.
            if s >= 1e-2 * reach and not (sides[0] < last[0] or sides[1] < last[1]):
                break
            last, s = sides, 4 * s
        return tuple(sorted(found.items()))

    def _must_stop(self, seconds: float) -> bool:
        stop = self._report.interrupted or self._report.in_phase > seconds
        return self.loss.on_any_worker(stop) if self.loss.workers > 1 else stop

    def _stop(self) -> None:
        """Store what is known after the last complete step, without another product."""
        self.is_stopped = True
        if self.ritz is None or self.lanczos is None or not self.ritz.orthogonal:
            return
        self.v, self.residual, self.error = self.lanczos.ritz_vector(), self.ritz.residual, self.ritz.rounding
        if self.products.unproven:  # the product along v was not compared with differences of gradients
            self.upper = math.inf
        if self._epsilon is None or self.rho is not None:
            self.verdict = self._judged(self.upper)

    def _from_random_vector(self) -> Lanczos:
        """Return a Lanczos process on the Hessian, from a random start vector; collective. It stores Lanczos vectors of
        up to `memory_limit` bytes in total, and at least two."""
        start = self.loss.random_vector(self._options.generator)
        return Lanczos(
            self.products,
            start,
            n=self.loss.d,
            dot=self.loss.dot,
            max_vectors=max(2, self._options.memory_limit // (8 * self.loss.longest(len(start)))),
            precision=self.products.precision,
            relative_error=lambda: self.products.relative_error,
            error=lambda: self.products.error,
        )

    def _bound(self, ritz: Ritz) -> None:
        probability = self._options.failure_probability
        self.lower, self.error = ritz.lower_bound(probability), ritz.rounding
        self.lambda_max = ritz.theta_max - ritz.rounding, ritz.upper_bound(probability)

    def _settled(self, ritz: Ritz) -> bool:
        verdict = self._judged(ritz.theta_min + ritz.rounding)
        if verdict.rests_on_negative_curvature and ritz.residual > self._tolerance * abs(ritz.theta_min):
            self._found_at = self._found_at or ritz.steps
            if ritz.steps - self._found_at < self._patience:
                return False
        return verdict is not Verdict.UNDECIDED and (self._epsilon is not None or ritz.is_settling)

    def _measure_direction(self, ritz: Ritz, v: Tensor) -> None:
        """Store the Ritz vector `v` as the direction, its residual, an upper bound on the smallest eigenvalue, and the
        verdict.

        The bound is the Rayleigh quotient of v plus its error. The quotient is the smallest Ritz value if the Lanczos
        vectors are orthonormal and the products are exact, and otherwise it is measured by one more product.
        """
        self.v, quotient, self.residual = v, ritz.theta_min, ritz.residual
        if not ritz.orthogonal or self.products.error or self.products.unproven:
            quotient, error = self._measure_quotient(v, self.products.checked)
            if error > ritz.rounding:
                self.ritz = ritz = replace(ritz, rounding=error)
                self._bound(ritz)
        self.upper = quotient + ritz.rounding
        self.verdict = self._judged(self.upper)

    def _measure_quotient(self, v: Tensor, products: Callable[[Tensor], tuple[Tensor, float]]) -> tuple[float, float]:
        """Compute the Rayleigh quotient of `v` by one Hessian-vector product, which `products` returns with its error,
        and store its residual in `self.residual`.

        Returns the quotient and the error of the product.
        """
        product, error = products(v)
        quotient = float(self.loss.dot(v, product))
        self.residual = self.loss.norm(product.sub_(v, alpha=quotient))
        return quotient, error

    def _judged(self, upper: float) -> Verdict:
        return judge(0.0, self._epsilon, self.rho or 0.0, self.lower, upper)


class Decision:
    """The search over all examples, after the searches of samples of them.

    `sample` is the search that found the direction which was then proved, or None if the search over all examples
    decides. `postponed` has the expected seconds of a search over all examples that was not started, since they exceed
    `Search.seconds`, or None.
    """

    def __init__(self, whole: CurvatureSearch, options: Search, report: Reporter) -> None:
        self.whole, self._options, self._report = whole, options, report
        self.sample: CurvatureSearch | None = None
        self.postponed: float | None = None

    def make(self, first: int) -> None:
        """Find on samples and prove on all examples, and otherwise search all examples; collective. `first` is the size
        of the first sample, by the gradient's noise."""
        loss, options, report = self.whole.loss, self._options, self._report
        try:
            seconds = self._search_samples(first)
        except Stopped:
            self.whole.is_stopped = True
            return
        if self.sample is not None:
            return
        expected = loss.total(seconds) / loss.total(1.0)  # the mean over workers
        if expected > options.seconds:
            self.postponed = expected
            return
        report.phase(f"bounds on all {loss.examples:,} examples", options.max_hvps * self._reads)
        self.whole.run(options.seconds)

    @property
    def _reads(self) -> int:
        """Number of times that a product reads the examples."""
        return 2 if isinstance(self.whole.products, Differences) else 1

    def _search_samples(self, size: int) -> float:
        """Search samples that grow, until what one finds is proved on all examples (`sample`), or one finds nothing.

        Returns the expected seconds of a search of all examples, or 0 if no sample was searched.
        """
        whole, options, report, seconds = self.whole, self._options, self._report, 0.0
        loss = whole.loss
        while options.sample and math.isinf(options.tolerance) and 4 * size <= loss.examples:
            if (part := loss.sample(size)) is None:
                break
            of = f"{part.examples:,} of {loss.examples:,} examples"
            report.phase(f"search on {of}", options.max_hvps * self._reads)
            few = whole.over(part)
            try:
                few.run()
            finally:
                loss.count(part)
            if few.is_stopped:
                raise Stopped
            whole.products.continue_from(few.products)
            seconds = report.in_phase * loss.examples / part.examples
            if few.v is None or not few.verdict.rests_on_negative_curvature:
                break
            report.phase(f"proof on all {loss.examples:,} examples", None)
            few.lanczos = None  # frees its vectors
            if whole.prove(few):
                self.sample = few
                break
            size *= _GROWTH
        return seconds

    def walk(self) -> tuple[Losses, Losses]:
        """Return the losses along the direction that was found: over all examples, and those to draw.

        If a sample found it, these are over the sample, and they select at most two distances for those over all
        examples. Returns nothing if Ctrl-C ends it.
        """
        whole, by = self.whole, self.sample or self.whole
        assert whole.v is not None
        self._report.phase("loss along v", None)
        try:
            drawn = by.walk(whole.v)
            if by is whole:
                return drawn, drawn
            losses = dict(drawn)
            distances = [s for s in losses if s > 0]
            lowest = min(distances, key=lambda s: min(losses[s], losses[-s]))
            bent = min(distances, key=lambda s: losses[s] + losses[-s])
            chosen = sorted({side for s in (lowest, bent) for side in (s, -s)})
            return tuple((s, whole.loss.loss_at(whole.v, s)) for s in chosen), drawn
        except Stopped:
            return (), ()


def size_of_sample(examples: int, error: float, grad_norm: float) -> int:
    """Return the number of examples of the first sample, of this number of all examples.

    In a sample of tr(Cov) / ||g||^2 examples the noise of the gradient is as large as the mean gradient g itself; Cov
    is the covariance of one example's gradient. `error` is the standard error of g, sqrt(tr(Cov) / N). The number is
    limited to between N / 256 and N / 32, and to at least 16.
    """
    noise = examples * (error / grad_norm) ** 2 if grad_norm else math.inf
    return round(max(_FEWEST, min(max(noise, examples / _LEAST), examples / _MOST)))
