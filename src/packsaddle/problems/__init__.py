"""Objectives with known saddles, spectra and constants, and their stochastic oracle."""

from packsaddle.problems.base import CriticalPoint, Problem
from packsaddle.problems.matrices import DeepLinear, MatrixFactorisation, MatrixSensing, RankOnePCA
from packsaddle.problems.oracle import Oracle
from packsaddle.problems.others import CurvedValley, MonkeySaddle, OrthogonalTensor, PhaseRetrieval
from packsaddle.problems.separable import Cosine, DoubleWells, Octopus, Quadratic, QuadraticQuartic

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
