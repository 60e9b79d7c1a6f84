"""Second-order information: Hessian-vector products, Lanczos, certificates of stationarity.

Start with `certify`. It uses `hessian` (derivatives on one worker or many; `sharded` for sharded models), `products`
(Hessian-vector products, with or without double backward), `lanczos` (bounds on the extreme eigenvalues) and `search`
(Lanczos steps, first on a part of the examples, until the verdict, such as "saddle", is decided).
"""

from packsaddle.curvature.certificate import Certificate, Share, Verdict, draw_iterates
from packsaddle.curvature.certify import CertifyEvery
from packsaddle.curvature.gradient_noise import GradientNoise
from packsaddle.curvature.hessian import Curvature
from packsaddle.curvature.lanczos import Lanczos
from packsaddle.curvature.options import Search
from packsaddle.curvature.population import PopulationCertificate, certify_population
from packsaddle.curvature.search import Bounds
from packsaddle.curvature.spectral_density import SpectralDensity, spectral_density

__all__ = [
    "Bounds",
    "Certificate",
    "CertifyEvery",
    "Curvature",
    "GradientNoise",
    "Lanczos",
    "PopulationCertificate",
    "Search",
    "Share",
    "SpectralDensity",
    "Verdict",
    "certify_population",
    "draw_iterates",
    "spectral_density",
]
