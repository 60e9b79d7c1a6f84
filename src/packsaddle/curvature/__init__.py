"""Second-order information: Hessian-vector products, Lanczos, certificates of stationarity.

Start with `certify`, which uses these modules:

- `hessian` computes losses, gradients and Hessian-vector products over the batches of all workers.
- `products` chooses how Hessian-vector products are computed: by double backward or by differences of gradients.
- `lanczos` bounds the extreme eigenvalues of the Hessian.
- `search` does Lanczos steps until a verdict on the point, such as "saddle", is decided.
"""

from packsaddle.curvature.certificate import Certificate, Share, Verdict, draw_iterates
from packsaddle.curvature.gradient_noise import GradientNoise
from packsaddle.curvature.hessian import Curvature
from packsaddle.curvature.lanczos import Lanczos
from packsaddle.curvature.options import Search
from packsaddle.curvature.search import Bounds

__all__ = [
    "Bounds",
    "Certificate",
    "Curvature",
    "GradientNoise",
    "Lanczos",
    "Search",
    "Share",
    "Verdict",
    "draw_iterates",
]
