"""Objectives with known saddles, spectra and constants, and their stochastic oracle."""

from packsaddle.theory.problems.base import CriticalPoint, Oracle, Problem
from packsaddle.theory.problems.matrices import DeepLinear, MatrixFactorisation, MatrixSensing, RankOnePCA
from packsaddle.theory.problems.nonconvex import CurvedValley, MonkeySaddle, OrthogonalTensor, PhaseRetrieval
from packsaddle.theory.problems.separable import Cosine, DoubleWells, Octopus, Quadratic, QuadraticQuartic

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
