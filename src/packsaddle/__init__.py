"""packsaddle: train on slow networks with the optimizer you have, and know where you have arrived.

Workers exchange compressed local updates or gradients. `certify` tests if the parameters reached are a saddle or a
second-order stationary point.
"""

from packsaddle import integrations as integrations
from packsaddle.checkpoint.files import CheckpointError
from packsaddle.checkpoint.save_load import Checkpoint, load_checkpoint, save_checkpoint
from packsaddle.comm.ledger import Bytes, Ledger, Span
from packsaddle.comm.simulation import simulate
from packsaddle.compressors.base import Compressor, Message
from packsaddle.compressors.kinds import *  # noqa: F403 -- all compressors
from packsaddle.compressors.registry import CLASSES
from packsaddle.curvature.certificate import Certificate, Verdict
from packsaddle.curvature.certify import certify
from packsaddle.curvature.gradient_noise import GradientNoise, gradient_noise
from packsaddle.curvature.options import Search
from packsaddle.feedback.checks import DriftError
from packsaddle.feedback.compression import Compression
from packsaddle.feedback.escape import Escape, Reset
from packsaddle.feedback.guard import NonFiniteError, Skip
from packsaddle.feedback.noise import Noise, Ramp
from packsaddle.hooks.ddp import attach, keep_gradients_local, register_ddp_hook
from packsaddle.hooks.fsdp import register_fsdp_hook
from packsaddle.local.options import Elastic, OuterAgreement, OuterSGD, Overlap, Workers
from packsaddle.local.round import Clip
from packsaddle.local.updates import LocalUpdates
from packsaddle.numerics.sketches import NormSketch
from packsaddle.sgd.optimizer import CompressedSGD
from packsaddle.theory.noise_walk import suggest_noise
from packsaddle.version import __version__ as __version__

__all__ = [
    *CLASSES,
    "Bytes",
    "Certificate",
    "Checkpoint",
    "CheckpointError",
    "Clip",
    "CompressedSGD",
    "Compression",
    "Compressor",
    "DriftError",
    "Elastic",
    "Escape",
    "GradientNoise",
    "Ledger",
    "LocalUpdates",
    "Message",
    "Noise",
    "NonFiniteError",
    "NormSketch",
    "OuterAgreement",
    "OuterSGD",
    "Overlap",
    "Ramp",
    "Reset",
    "Search",
    "Skip",
    "Span",
    "Verdict",
    "Workers",
    "attach",
    "certify",
    "gradient_noise",
    "keep_gradients_local",
    "load_checkpoint",
    "register_ddp_hook",
    "register_fsdp_hook",
    "save_checkpoint",
    "simulate",
    "suggest_noise",
]


def __dir__() -> list[str]:
    """List only the public names, without the submodules that were imported."""
    return sorted([*__all__, "__version__"])
