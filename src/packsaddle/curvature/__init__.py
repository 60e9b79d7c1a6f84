"""Second-order information: Hessian-vector products, Lanczos, certificates of stationarity.

Start with `certify`, which uses these modules:

- `mean_loss` computes the loss and its gradient over the batches of all workers, and takes samples of the examples;
  `sharded` does so for a model that FSDP2 or tensor parallelism shards.
- `products` is the interface of Hessian-vector products, of which there are two kinds: `double_backward` (with
  `hessian`) and `differences` of gradients.
- `lanczos` bounds the extreme eigenvalues of the Hessian.
- `search` finds a direction of negative curvature on a sample of the examples and proves it on all, or bounds the
  smallest eigenvalue over all examples.
- `progress` shows what is being done, and ends it after Ctrl-C.
"""

from packsaddle.curvature.certificate import Certificate, Share, Verdict, draw_iterates
from packsaddle.curvature.gradient_noise import GradientNoise
from packsaddle.curvature.hessian import Curvature
from packsaddle.curvature.lanczos import Lanczos
from packsaddle.curvature.options import Search
from packsaddle.curvature.progress import Progress

__all__ = [
    "Certificate",
    "Curvature",
    "GradientNoise",
    "Lanczos",
    "Progress",
    "Search",
    "Share",
    "Verdict",
    "draw_iterates",
]
