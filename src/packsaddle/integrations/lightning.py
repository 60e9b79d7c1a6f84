"""Callbacks for Lightning's DDPStrategy that compress gradients, train with local updates, or check if the model is at
a saddle point.

Lightning's own argument for hooks, `DDPStrategy(ddp_comm_hook=...)`, has an effect only on GPUs. These callbacks work
on all devices that DDPStrategy supports. This module needs lightning 2.x: pip install 'packsaddle[lightning]'.
"""

import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch import callbacks as theirs
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from packsaddle.compressors import Rounded, Sign
from packsaddle.curvature.certificate import Certificate
from packsaddle.curvature.certify import certify
from packsaddle.curvature.mean_loss import LossFn
from packsaddle.feedback.compression import AnyCompression
from packsaddle.integrations.callbacks import (
    Attached,
    WorkerState,
    certificate_line,
    certificate_scalars,
    load_state,
    measures,
    save_state,
)
from packsaddle.local.updates import LocalUpdates


class _Attached(Attached, Callback):
    """Base callback: attaches a DDP hook or local updates when training starts, logs their metrics, and saves and
    restores their state."""

    def __init__(
        self,
        compressor: AnyCompression = Rounded("int4"),  # noqa: B008 -- immutable
        **options: Any,
    ) -> None:
        super().__init__(compressor, options)
        self._saved = False  # True if the loaded checkpoint has workers' states next to it, which are not restored yet

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wrap the strategy's methods that save and remove checkpoints, so that this worker's state is saved and
        removed with each checkpoint."""
        if stage == "fit":
            # Reset `_saved` too, since it may have been set by a checkpoint that was loaded for `Trainer.test`.
            self.exchange, self._saved = None, False
            # Do not wrap the methods again if an earlier call of `fit` has wrapped them.
            if not isinstance(getattr(trainer.strategy.save_checkpoint, "__self__", None), _Files):
                _Files(self, trainer.strategy)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the hook or local updates, and restore their state if a checkpoint was loaded. Raises the exceptions
        of `_make` and `load_state`."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        wrapped, every = trainer.strategy.model, trainer.log_every_n_steps
        self.exchange = self._make(wrapped, pl_module, trainer.optimizers, scaler, every)
        if self._saved:
            # Resolve the path, since last.ckpt may be a link to another checkpoint.
            load_state(self.exchange, folder_of(Path(trainer.ckpt_path).resolve()))
        self._saved = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log the metrics of `measures`. The metrics are logged as float64, in which counts of bytes are exact. Loggers
        receive the metrics of rank 0."""
        if self.exchange is not None:
            now = measures(self.exchange).items()
            found = {f"packsaddle/{k}": torch.tensor(v, dtype=torch.float64) for k, v in now}
            pl_module.log_dict(found, on_step=True, on_epoch=False)

    def state_dict(self) -> dict[str, Any]:
        """Return {"steps": the number of steps}, which Lightning stores in the checkpoint. The entry marks a checkpoint
        that has workers' states next to it. Returns {} if neither a hook nor local updates are attached."""
        return {} if self.exchange is None else {"steps": self.exchange.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Record in `_saved` if workers' states were saved next to the loaded checkpoint: `state`, a result of
        `state_dict`, then has the entry "steps". `on_train_start` restores these states after it has attached the hook
        or local updates."""
        self._saved = "steps" in state

    def apart(self) -> AbstractContextManager[None]:
        """Context manager within which the model has this worker's own parameters. It is a no-op here, and
        `LocalUpdatesCallback` overrides it."""
        return nullcontext()

    def together(self) -> AbstractContextManager[None]:
        """Context manager within which the model has parameters that are identical on all workers. It is a no-op here,
        and `LocalUpdatesCallback` overrides it."""
        return nullcontext()


class PacksaddleCallback(_Attached):
    """Compresses the gradients that workers exchange, and logs the metrics of `measures` as packsaddle/sent and so on.

    It accepts the arguments of `register_ddp_hook` except `optimizer` and `scaler`, which are the trainer's. The
    contraction, i.e. the fraction of the squared norm that compression keeps, is measured every `log_every_n_steps`
    steps. If `compressor` is a `Compression`, it sets the interval instead.

    Every worker saves its own state next to the checkpoint, in the folder CHECKPOINT.packsaddle. This folder is
    removed with the checkpoint, and `Trainer.fit(ckpt_path=...)` loads it. With one worker nothing is attached, and a
    warning is issued. `hook` is the DDPHook; it is None before training and with one worker.
    """


class LocalUpdatesCallback(_Attached):
    """Trains with `packsaddle.LocalUpdates`: workers step separately and average their changes every `every` steps.

    It accepts the arguments of `LocalUpdates` except `optimizer` and `scaler`, which are the trainer's. DDPStrategy
    exchanges no gradients from the start of training. The metrics of `measures` are logged as packsaddle/sent and so
    on. The contraction, i.e. the fraction of the squared norm that compression keeps, is measured in every round. If
    `compressor` is a `Compression`, it sets the interval instead.

    Validation during `fit`, and checkpoints, use the anchor, i.e. the parameters on which all workers last agreed. At
    the end of training pending updates are exchanged (`LocalUpdates.flush`), after which the parameters of every worker
    are the anchor.

    Every worker saves its own state, including parameters and optimizer state, next to the checkpoint, as with
    `PacksaddleCallback`. A run may resume on another number of workers (see `load_checkpoint`). With one worker nothing
    is sent, and a warning is issued. `local` is the LocalUpdates.
    """

    _makes = LocalUpdates

    def __init__(
        self,
        *,
        compressor: AnyCompression = Sign(per_tensor=True),  # noqa: B008 -- immutable
        **options: Any,
    ) -> None:
        super().__init__(compressor, **options)
        self._training = self._evaluating = False
        self._evaluation = ExitStack()  # has entered the context `together()` during validation

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach local updates, and restore their state if a checkpoint was loaded. Raises ValueError if a callback
        that averages the weights over steps comes after this callback in `trainer.callbacks`."""
        # At the end of training this callback makes the parameters identical on all workers. A callback that runs after
        # this one must not replace them with an average that differs between workers.
        names = ("StochasticWeightAveraging", "WeightAveraging")  # WeightAveraging exists from Lightning 2.6 on
        kinds = tuple(getattr(theirs, name) for name in names if hasattr(theirs, name))
        for callback in trainer.callbacks[trainer.callbacks.index(self) :]:
            if isinstance(callback, kinds):
                raise ValueError(
                    f"LocalUpdatesCallback must come after {type(callback).__name__} in callbacks: otherwise every "
                    f"worker ends with an average of its own"
                )
        super().on_train_start(trainer, pl_module)
        self._training = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the parameters to the anchor, i.e. to the parameters on which all workers last agreed, until the end of
        validation. No-op in `trainer.validate` outside of `fit`."""
        self._evaluating = True
        self._evaluation.enter_context(self.together())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluating = False
        self._evaluation.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = False
        if isinstance(self.exchange, WorkerState):
            self.exchange.finish()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make `together` a no-op until training starts again. `together` sets the parameters to the anchor, i.e. to
        the parameters on which all workers last agreed. After training this would overwrite the user's changes."""
        self._training = False

    def together(self) -> AbstractContextManager[None]:
        """Context manager that sets the parameters to the anchor, i.e. to the parameters on which all workers last
        agreed. No-op outside training."""
        return self.local.at_anchor() if self.local is not None and self._training else nullcontext()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Context manager within which the model has this worker's own parameters, so that this worker's state can be
        saved. It is needed during validation, when the model has the anchor's parameters (on which all workers last
        agreed) and Lightning may save a checkpoint. No-op outside validation."""
        self._evaluation.close()
        try:
            yield
        finally:
            if self._evaluating:
                self._evaluation.enter_context(self.together())


def folder_of(checkpoint: str | Path) -> Path:
    path = Path(checkpoint)
    return path.with_name(path.name + ".packsaddle")


class _Files:
    """Replaces the methods of a strategy that collect, save and remove a checkpoint, so that the workers' states are
    saved and removed with each checkpoint. These methods are used, and not those of a callback, since only they receive
    the checkpoint's path on every worker."""

    def __init__(self, callback: _Attached, strategy: Strategy) -> None:
        self._callback, self._strategy, self._names = callback, strategy, dict[str, str]()
        self._save, self._remove = strategy.save_checkpoint, strategy.remove_checkpoint
        self._tensors = strategy.lightning_module_state_dict
        strategy.save_checkpoint, strategy.remove_checkpoint = self.save, self.remove
        strategy.lightning_module_state_dict = self.tensors

    def save(self, checkpoint: dict[str, Any], filepath: str | Path, *args: Any, **options: Any) -> None:
        """Save a checkpoint to `filepath`. Also save this worker's state next to the checkpoint, unless the checkpoint
        contains only weights. All workers use rank 0's `filepath`, since its name may contain a metric that differs
        between workers."""
        exchange = self._callback.exchange
        if exchange is not None:
            self._names[str(filepath)] = filepath = self._strategy.broadcast(str(filepath))
        if exchange is not None and "callbacks" in checkpoint:
            if "://" in str(filepath):
                warnings.warn(f"{filepath} is not on a disk: packsaddle's state is not saved", stacklevel=2)
            else:
                with self._callback.apart():
                    save_state(exchange, folder_of(filepath))
        # Save with the parameters set to the anchor, on which all workers last agreed, since the checkpoint may contain
        # views of the parameters.
        with self._callback.together():
            self._save(checkpoint, filepath, *args, **options)

    def tensors(self) -> dict[str, Any]:
        """Return the model's `state_dict`, as the strategy collects it, with the parameters set to the anchor, on which
        all workers last agreed. The returned tensors are views or copies of the parameters, depending on the
        strategy."""
        with self._callback.together():
            found: dict[str, Any] = self._tensors()
        return found

    def remove(self, filepath: str | Path) -> None:
        """Remove the checkpoint at `filepath`. On rank 0, also remove all workers' states next to the checkpoint. Other
        ranks do not remove states, since they may have chosen to remove a different checkpoint."""
        filepath = self._names.pop(str(filepath), filepath)
        if self._callback.exchange is not None and self._strategy.is_global_zero:
            shutil.rmtree(folder_of(filepath), ignore_errors=True)
        self._remove(filepath)


class CertificateCallback(Callback):
    """Computes a `Certificate`, which bounds the Hessian's smallest eigenvalue, every `every_n_steps` steps. The
    callback logs the certificate's numbers, and prints its verdict, for example that the model is at a saddle point.

    The numbers are logged as certificate/grad_norm and so on. `certificate` is the last certificate, or None before the
    first. `loss_fn(pl_module, batch)` returns the mean loss of a batch, and must not call `log`. `batches` is an
    iterable of this worker's batches, which must be identical in every pass. `options` are further arguments of
    `packsaddle.certify`. With a LocalUpdatesCallback in the trainer the anchor, i.e. the parameters on which all
    workers last agreed, is certified. Raises ValueError if `every_n_steps` is below 1.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        batches: Iterable[Any],
        *,
        every_n_steps: int,
        **options: Any,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.certificate: Certificate | None = None
        self._loss_fn, self._batches, self._options = loss_fn, batches, options
        self._every = every_n_steps
        self._seen = 0  # `trainer.global_step` after the last batch, or at the start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the trainer's current step, so that certificates that were due before it are not computed. In a
        resumed run the current step is that of the checkpoint."""
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        # With several optimizers, global_step may grow by more than 1 in a batch, and so skip a multiple of
        # `every_n_steps`.
        before, self._seen = self._seen, trainer.global_step
        if self._seen // self._every > before // self._every:
            self._certify(trainer, pl_module)

    def _certify(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def loss_fn(module: nn.Module, batch: Any) -> Tensor:
            return self._loss_fn(module, trainer.strategy.batch_to_device(batch))

        with ExitStack() as stack:
            for callback in trainer.callbacks:
                if isinstance(callback, _Attached):
                    stack.enter_context(callback.together())
            self.certificate = certify(pl_module, loss_fn, self._batches, progress=False, **self._options)
        for logger in trainer.loggers:
            logger.log_metrics(certificate_scalars(self.certificate), step=trainer.global_step)
        if trainer.is_global_zero:
            print(certificate_line(self.certificate, trainer.global_step), flush=True)
