"""Second-order information: Hessian-vector products, Lanczos, certificates of stationarity, stability of step sizes.

Read `certify` first: the certificate, from `hessian` (derivatives on one worker or many; `sharded`, of a model of which
each has a part), `products` (of the Hessian and a vector, with or without double backward), `lanczos` (bounds on the
extreme eigenvalues) and `search` (steps until the verdict is settled, on a part of the examples first). `options` has
the limits of a search. `certificate` has the verdict and its evidence, and draws the iterates to certify; `population`
speaks of the loss that examples are drawn from, and `watch` certifies a training as it goes. `spectral_density` is that
of all eigenvalues; `step_stability` finds steps that are too long for the curvature.
"""

from packsaddle.curvature.certificate import Certificate, Share, Verdict, draw_iterates
from packsaddle.curvature.gradient_noise import GradientNoise
from packsaddle.curvature.hessian import Curvature
from packsaddle.curvature.lanczos import Lanczos
from packsaddle.curvature.options import Search
from packsaddle.curvature.population import PopulationCertificate, certify_population
from packsaddle.curvature.search import Bounds
from packsaddle.curvature.spectral_density import SpectralDensity, spectral_density
from packsaddle.curvature.step_stability import CoordinateStep, Overshoot, largest_overshoot
from packsaddle.curvature.watch import CertifyEvery

__all__ = [
    "Bounds",
    "Certificate",
    "CertifyEvery",
    "CoordinateStep",
    "Curvature",
    "GradientNoise",
    "Lanczos",
    "Overshoot",
    "PopulationCertificate",
    "Search",
    "Share",
    "SpectralDensity",
    "Verdict",
    "certify_population",
    "draw_iterates",
    "largest_overshoot",
    "spectral_density",
]
