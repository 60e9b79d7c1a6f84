"""Objectives with known saddles, spectra and constants, and their stochastic oracle."""

from experiments.paper.problems.base import CriticalPoint, Oracle, Problem
from experiments.paper.problems.matrices import DeepLinear, MatrixFactorisation, MatrixSensing, RankOnePCA
from experiments.paper.problems.nonconvex import CurvedValley, MonkeySaddle, OrthogonalTensor, PhaseRetrieval
from experiments.paper.problems.separable import Cosine, DoubleWells, Octopus, Quadratic, QuadraticQuartic

__all__ = [
    "Cosine",
    "CriticalPoint",
    "CurvedValley",
    "DeepLinear",
    "DoubleWells",
    "MatrixFactorisation",
    "MatrixSensing",
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
