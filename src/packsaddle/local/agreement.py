"""Agreement of workers: the more the workers' updates of a tensor differ, the more their mean is lengthened.

The workers' noise cancels in their mean D = sum_i w_i q_i (weights w_i with sum 1, q_i the decoded messages), so D has
a smaller norm than the updates q_i. With the exponent p in [0, 1] (see `OuterAgreement`), D is multiplied by

    r^p,    r^2 = sum_i w_i norm(q_i)^2 / norm(D)^2,    r clamped to [1, sqrt(W)],

for each tensor separately. W is the number of workers. r is 1 if all workers send the same update, and sqrt(W) if W
updates of equal norm are orthogonal. Each worker adds the numbers w_i norm(q_i)^2 to the uncompressed part of an
exchange, four bytes per tensor. The rule is ours, measured in experiments/nanogpt.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from packsaddle.local.inner import Shards


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
