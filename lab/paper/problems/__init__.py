"""Objectives with known saddles, spectra and constants, and their stochastic oracle."""

from lab.paper.problems.base import CriticalPoint, Oracle, Problem
from lab.paper.problems.matrices import MatrixFactorisation, RankOnePCA
from lab.paper.problems.nonconvex import CurvedValley, MonkeySaddle, OrthogonalTensor, PhaseRetrieval
from lab.paper.problems.separable import Cosine, DoubleWells, Octopus, Quadratic, QuadraticQuartic

__all__ = [
    "Cosine",
    "CriticalPoint",
    "CurvedValley",
    "DoubleWells",
    "MatrixFactorisation",
    "MonkeySaddle",
    "Octopus",
    "Oracle",
    "OrthogonalTensor",
    "PhaseRetrieval",
    "Problem",
    "Quadratic",
    "QuadraticQuartic",
    "RankOnePCA",
]
