"""The options of a search for negative curvature."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch

from packsaddle.curvature.lanczos import check_probability

Hvp = Literal["auto", "double-backward", "differences"]


@dataclass(frozen=True)
class Search:
    """The limits of a search for negative curvature, and the method of its Hessian-vector products.

    Raises ValueError for a value outside its range.

    Args:
        max_hvps: Maximum number of Hessian-vector products for the bounds, at least 1; a verdict needs a few more.
        failure_probability: Failure probability, over the random start vector of Lanczos, of the lower bound on
            lambda_min and of the upper bound on lambda_max, in [1e-100, 1).
        tolerance: Largest relative residual of a saddle's direction, above 0: the search continues until
            ||H v - lambda v|| <= tolerance |lambda|. With inf it stops once the verdict is decided.
        hvp: Method of the Hessian-vector products. "double-backward" is exact; "differences" of gradients have an
            error, which is measured and widens both bounds. "auto" uses double backward, or differences if torch does
            not support it (compiled networks, flash-attn) or if it is wrong (a custom autograd.Function, see
            docs/certificates.md).
        sample: Search a sample of the examples first, and prove what it finds on all of them. A saddle is then proved
            in the time of a few passes, without the other bounds on eigenvalues. With False, or with a finite
            tolerance, all products are over all examples.
        seconds: Longest time of the search of all examples that is needed where the sample finds nothing. It is not
            started if it is expected to take longer, and ends after this time with the bounds so far. inf: no limit.
        always: Search for negative curvature also if the gradient is too large, which decides the verdict already.
        memory_limit: Maximum number of bytes of stored Lanczos vectors, which have 8 d bytes each for d coordinates; at
            least 0. If not all vectors are stored, the bounds need a few more products, and the escape direction needs
            one more product for each vector that was not stored.
        generator: Generator from which rank 0 draws the random start vector; use a new one for every certificate. By
            default it is seeded by the operating system.
    """

    max_hvps: int = 200
    failure_probability: float = 1e-3
    tolerance: float = math.inf
    hvp: Hvp = "auto"
    sample: bool = True
    seconds: float = 60.0
    always: bool = False
    memory_limit: int = 4 * 2**30
    generator: torch.Generator | None = field(default=None, metadata={"internal": True})

    def __post_init__(self) -> None:
        if self.max_hvps < 1:
            raise ValueError(f"max_hvps must be at least 1, got {self.max_hvps}")
        check_probability(self.failure_probability)
        if not self.tolerance > 0:
            raise ValueError(f"tolerance must be positive, got {self.tolerance}")
        if not self.seconds > 0:
            raise ValueError(f"seconds must be positive, got {self.seconds}")
        if self.memory_limit < 0:
            raise ValueError(f"memory_limit must not be negative, got {self.memory_limit}")
        if self.hvp not in get_args(Hvp):
            raise ValueError(f"hvp must be one of {', '.join(get_args(Hvp))}, got {self.hvp!r}")
