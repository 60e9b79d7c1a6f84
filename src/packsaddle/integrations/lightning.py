"""Lightning: callbacks that compress the exchange of DDPStrategy, log it, keep its state, and certify the model.

Lightning's own `DDPStrategy(ddp_comm_hook=...)` registers hooks on GPUs only; these callbacks work wherever DDPStrategy
does. Needs lightning 2.x: pip install 'packsaddle[lightning]'.
"""

import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from packsaddle.compressors import Compressor, TopK
from packsaddle.curvature.certificate import Certificate, Verdict
from packsaddle.curvature.certify import certify
from packsaddle.curvature.hessian import LossFn
from packsaddle.integrations.callbacks import attach_among_workers, load_state, measures, monitored, save_state, scalars
from packsaddle.optim.compression import Compression, Schedule
from packsaddle.optim.ddp import DDPHook


class PacksaddleCallback(Callback):
    """Exchanges gradients compressed when training starts, and logs `measures` as packsaddle/sent and so on.

    Takes what `register_ddp_hook` takes, but for `optimizer` and `scaler`, which are the trainer's. The contraction
    is measured every `log_every_n_steps`; a `Compression` says itself when.

    Every worker keeps its own state beside the checkpoint, as CHECKPOINT.packsaddle/packsaddle-RANK.pt, which goes when
    the checkpoint goes; `Trainer.fit(ckpt_path=...)` restores it. With one worker a warning is all that happens.
    `hook` is the DDPHook while there is one.
    """

    def __init__(
        self,
        compressor: Compressor | Schedule | Compression = TopK(0.1),  # noqa: B008 -- immutable
        **options: Any,
    ) -> None:
        self.hook: DDPHook | None = None
        self._compressor, self._options = compressor, options
        self._saved = False  # whether the checkpoint that is being loaded has hooks' states beside it

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the strategy save and remove this worker's state with its checkpoints."""
        if stage == "fit":
            self.hook = None
            _Files(self).accompany(trainer.strategy)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the hook, and restore it; raises what `register_ddp_hook` raises."""
        options = {"scaler": getattr(trainer.precision_plugin, "scaler", None), **self._options}
        spec = monitored(self._compressor, trainer.log_every_n_steps)
        self.hook = attach_among_workers(trainer.strategy.model, spec, trainer.optimizers, **options)
        if self.hook is not None and self._saved:
            load_state(self.hook, beside(Path(trainer.ckpt_path).resolve()))  # last.ckpt may be a link
        self._saved = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log in double precision, since single is too short for bytes; rank 0's numbers are those that loggers get."""
        if self.hook is not None:
            found = {f"packsaddle/{k}": torch.tensor(v, dtype=torch.float64) for k, v in measures(self.hook).items()}
            pl_module.log_dict(found, on_step=True, on_epoch=False)

    def state_dict(self) -> dict[str, Any]:
        """Mark a checkpoint that has hooks' states beside it."""
        return {} if self.hook is None else {"steps": self.hook.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Note the mark; `on_train_start` restores, once there is a hook."""
        self._saved = "steps" in state


def beside(checkpoint: str | Path) -> Path:
    """Return the folder of hooks' states that belongs to a checkpoint."""
    path = Path(checkpoint)
    return path.with_name(path.name + ".packsaddle")


class _Files:
    """Takes part when a strategy saves or removes a checkpoint.

    Lightning tells callbacks that it saves but not where, and only the strategy hears that on every worker.
    """

    def __init__(self, callback: PacksaddleCallback) -> None:
        self._callback = callback

    def accompany(self, strategy: Strategy) -> None:
        """Stand before the strategy's two methods, once."""
        if isinstance(getattr(strategy.save_checkpoint, "__self__", None), _Files):  # since an earlier fit
            return
        self._save, self._remove = strategy.save_checkpoint, strategy.remove_checkpoint
        strategy.save_checkpoint, strategy.remove_checkpoint = self.save, self.remove

    def save(self, checkpoint: dict[str, Any], filepath: str | Path, *args: Any, **options: Any) -> None:
        """Save this worker's state too, unless the checkpoint is of weights alone."""
        if self._callback.hook is not None and "callbacks" in checkpoint:
            if "://" in str(filepath):
                warnings.warn(f"{filepath} is not on a disk: the state of packsaddle's hook is not saved", stacklevel=2)
            else:
                save_state(self._callback.hook, beside(filepath))
        self._save(checkpoint, filepath, *args, **options)

    def remove(self, filepath: str | Path) -> None:
        """Remove this worker's state too."""
        if self._callback.hook is not None:
            shutil.rmtree(beside(filepath), ignore_errors=True)
        self._remove(filepath)


class CertificateCallback(Callback):
    """Certifies the model every so many epochs or steps (is it at a saddle?) and logs certificate/grad_norm and so on.

    loss_fn(pl_module, batch) is a batch's mean loss, without calls of `log`; `batches` are this worker's, the same each
    time; `options` are those of `packsaddle.certify`. `certificate` is the last one.
    Raises ValueError unless one of the two intervals is given.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        batches: Iterable[Any],
        *,
        epsilon: float,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        **options: Any,
    ) -> None:
        if (every_n_epochs is None) == (every_n_steps is None) or (every_n_epochs or every_n_steps or 0) < 1:
            raise ValueError(
                f"give one of every_n_epochs and every_n_steps, at least 1, got {every_n_epochs} and {every_n_steps}"
            )
        self.certificate: Certificate | None = None
        self._loss_fn, self._batches, self._options = loss_fn, batches, {"epsilon": epsilon, **options}
        self._epochs, self._steps = every_n_epochs, every_n_steps
        self._seen = 0  # steps at the last batch's end

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Certify if the batch ended a step that is due."""
        before, self._seen = self._seen, trainer.global_step
        if self._steps is not None and self._seen > before and self._seen % self._steps == 0:
            self._certify(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Certify if the epoch is due."""
        if self._epochs is not None and (trainer.current_epoch + 1) % self._epochs == 0:
            self._certify(trainer, pl_module)

    def _certify(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def loss_fn(module: nn.Module, batch: Any) -> Tensor:
            return self._loss_fn(module, trainer.strategy.batch_to_device(batch))

        self.certificate = certify(pl_module, loss_fn, self._batches, **self._options)
        found = scalars(self.certificate.to_dict(), "certificate/")
        found["certificate/saddle"] = float(self.certificate.verdict is Verdict.SADDLE)
        for logger in trainer.loggers:
            logger.log_metrics(found, step=trainer.global_step)
