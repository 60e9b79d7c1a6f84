"""Second-order information: Hessian-vector products, Lanczos, certificates of stationarity, stability of step sizes.

Read `certify` first: the certificate, from `hessian` (derivatives on one worker or many; `sharded`, of a model of which
each has a part), `products` (of the Hessian and a vector, with or without double backward) and `lanczos` (bounds on the
extreme eigenvalues). `certificate` has the verdict and its evidence, and draws the iterates to certify;
`spectral_density` is that of all eigenvalues; `step_stability` finds steps that are too long for the curvature.
"""

from packsaddle.curvature.certificate import Certificate, Share, Verdict, draw_iterates
from packsaddle.curvature.gradient_noise import GradientNoise
from packsaddle.curvature.hessian import Curvature
from packsaddle.curvature.lanczos import Lanczos
from packsaddle.curvature.spectral_density import SpectralDensity, spectral_density
from packsaddle.curvature.step_stability import CoordinateStep, Overshoot, largest_overshoot

__all__ = [
    "Certificate",
    "CoordinateStep",
    "Curvature",
    "GradientNoise",
    "Lanczos",
    "Overshoot",
    "Share",
    "SpectralDensity",
    "Verdict",
    "draw_iterates",
    "largest_overshoot",
    "spectral_density",
]
