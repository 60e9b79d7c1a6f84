"""packsaddle: training over slow networks with compressed gradients, without getting stuck at saddle points."""

from packsaddle.certificate import Certificate, Verdict
from packsaddle.certify import certify
from packsaddle.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from packsaddle.checkpointfiles import CheckpointError
from packsaddle.compress import (
    QSGD,
    AdaptiveTopK,
    Compressor,
    Identity,
    LinearSketch,
    LowRank,
    Message,
    RandomK,
    Sign,
    SketchTopK,
    TopK,
)
from packsaddle.ddp import attach, register_ddp_hook
from packsaddle.drift import Drift, DriftError
from packsaddle.escape import Escape, Reset
from packsaddle.fsdp import register_fsdp_hook
from packsaddle.gradientnoise import GradientNoise, gradient_noise
from packsaddle.ledger import Bytes, Ledger, Span
from packsaddle.noise import Ramp
from packsaddle.optimizer import CompressedSGD
from packsaddle.simulate import simulate
from packsaddle.sketch import NormSketch
from packsaddle.skips import NonFiniteError, Skip
from packsaddle.walk import suggest_noise
from packsaddle.warmup import RatioRamp

__version__ = "0.1.0"

__all__ = [
    "QSGD",
    "AdaptiveTopK",
    "Bytes",
    "Certificate",
    "Checkpoint",
    "CheckpointError",
    "CompressedSGD",
    "Compressor",
    "Drift",
    "DriftError",
    "Escape",
    "GradientNoise",
    "Identity",
    "Ledger",
    "LinearSketch",
    "LowRank",
    "Message",
    "NonFiniteError",
    "NormSketch",
    "Ramp",
    "RandomK",
    "RatioRamp",
    "Reset",
    "Sign",
    "SketchTopK",
    "Skip",
    "Span",
    "TopK",
    "Verdict",
    "attach",
    "certify",
    "gradient_noise",
    "load_checkpoint",
    "register_ddp_hook",
    "register_fsdp_hook",
    "save_checkpoint",
    "simulate",
    "suggest_noise",
]
