"""Lightning: callbacks that compress what DDPStrategy's workers exchange, gradients or local updates, log it, keep its
state, and certify the model.

Lightning's own `DDPStrategy(ddp_comm_hook=...)` registers hooks on GPUs only; these callbacks work wherever DDPStrategy
does. Needs lightning 2.x: pip install 'packsaddle[lightning]'.
"""

import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch import callbacks as theirs
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from packsaddle.compressors import QSGD, Compressor, Sign
from packsaddle.curvature.certificate import Certificate
from packsaddle.curvature.certify import certify
from packsaddle.curvature.hessian import LossFn
from packsaddle.feedback.compression import Compression, Schedule
from packsaddle.hooks.ddp_hook import DDPHook
from packsaddle.integrations.callbacks import (
    Attached,
    WorkerState,
    attach_among_workers,
    attach_local_updates,
    certificate_scalars,
    load_state,
    measures,
    monitored,
    save_state,
)


class _Attached(Attached, Callback):
    """Attaches an exchange when training starts, logs its measures and keeps its state with checkpoints."""

    def __init__(self, compressor: Compressor | Schedule | Compression, options: Mapping[str, Any]) -> None:
        super().__init__(compressor, options)
        self._saved = False  # whether the checkpoint that is being loaded has workers' states next to it

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> DDPHook | WorkerState | None:
        raise NotImplementedError

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the strategy save and remove this worker's state with its checkpoints."""
        if stage == "fit":
            self.exchange, self._saved = None, False  # the latter may be of a checkpoint that was tested
            _Files(self).accompany(trainer.strategy)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, and restore; raises what attaching raises."""
        self.exchange = self._attach(trainer, pl_module)
        if self.exchange is not None and self._saved:
            load_state(self.exchange, folder_of(Path(trainer.ckpt_path).resolve()))  # last.ckpt may be a link
        self._saved = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log in double precision, since single is too short for bytes; rank 0's numbers are those that loggers get."""
        if self.exchange is not None:
            now = measures(self.exchange).items()
            found = {f"packsaddle/{k}": torch.tensor(v, dtype=torch.float64) for k, v in now}
            pl_module.log_dict(found, on_step=True, on_epoch=False)

    def state_dict(self) -> dict[str, Any]:
        """Mark a checkpoint that has workers' states next to it."""
        return {} if self.exchange is None else {"steps": self.exchange.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Note the mark; `on_train_start` restores, once there is an exchange."""
        self._saved = "steps" in state

    def apart(self) -> AbstractContextManager[None]:
        """Have this worker's own parameters for a while."""
        return nullcontext()

    def together(self) -> AbstractContextManager[None]:
        """Have what is the same on all workers for a while."""
        return nullcontext()


class PacksaddleCallback(_Attached):
    """Exchanges gradients compressed when training starts, and logs `measures` as packsaddle/sent and so on.

    Takes what `register_ddp_hook` takes, but for `optimizer` and `scaler`, which are the trainer's. The contraction
    is measured every `log_every_n_steps`; a `Compression` says itself when.

    Every worker keeps its own state next to the checkpoint, as CHECKPOINT.packsaddle/packsaddle-RANK.pt, which goes
    when the checkpoint goes; `Trainer.fit(ckpt_path=...)` restores it. With one worker a warning is all that happens.
    `hook` is the DDPHook while there is one.
    """

    def __init__(
        self,
        compressor: Compressor | Schedule | Compression = QSGD(127),  # noqa: B008 -- immutable
        **options: Any,
    ) -> None:
        super().__init__(compressor, options)

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> DDPHook | None:
        options = {"scaler": getattr(trainer.precision_plugin, "scaler", None), **self._options}
        spec = monitored(self._compressor, trainer.log_every_n_steps)
        return attach_among_workers(trainer.strategy.model, spec, trainer.optimizers, **options)


class LocalUpdatesCallback(_Attached):
    """Has each worker step by itself and exchanges what was moved every `every` steps: `packsaddle.LocalUpdates`.

    Takes what `LocalUpdates` takes, but for `optimizer` and `scaler`, which are the trainer's. DDPStrategy exchanges no
    gradients from the start of training on. `measures` are logged as packsaddle/sent and so on; the contraction is
    measured in every round; a `Compression` says itself when.

    Validation during `fit` sees the anchor, which is the same on all workers, and checkpoints have it. At the end all
    that is pending is exchanged, and every worker has the anchor.

    Every worker keeps its own state, parameters and optimizer's state among it, next to the checkpoint, as
    `PacksaddleCallback` does. With one worker a warning is all that happens. `local` is the LocalUpdates while there is
    one.
    """

    def __init__(
        self,
        *,
        compressor: Compressor | Schedule | Compression = Sign(per_tensor=True),  # noqa: B008 -- immutable
        **options: Any,
    ) -> None:
        super().__init__(compressor, options)
        self._training = self._evaluating = False
        self._evaluation = ExitStack()  # has the parameters at the anchor while there is something in it

    def _attach(self, trainer: Trainer, pl_module: LightningModule) -> WorkerState | None:
        options = {"scaler": getattr(trainer.precision_plugin, "scaler", None), **self._options}
        _check_order(trainer.callbacks, self)
        strategy = trainer.strategy
        found = attach_local_updates(strategy.model, pl_module, trainer.optimizers, self._compressor, **options)
        self._training = found is not None
        return found

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go to the anchor; not in `trainer.validate`, which may have loaded another model."""
        self._evaluating = True
        self._evaluation.enter_context(self.together())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go back to this worker's parameters."""
        self._evaluating = False
        self._evaluation.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Go back to this worker's parameters."""
        self._evaluating = False
        self._evaluation.close()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exchange what is pending."""
        self._training = False
        if isinstance(self.exchange, WorkerState):
            self.exchange.finish()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the parameters to others."""
        self._training = False

    def together(self) -> AbstractContextManager[None]:
        """Have the parameters at the anchor for a while, in training."""
        return self.local.at_anchor() if self.local is not None and self._training else nullcontext()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Have this worker's own parameters for a while, if a checkpoint is saved during validation."""
        self._evaluation.close()
        yield
        if self._evaluating:
            self._evaluation.enter_context(self.together())


def _check_order(callbacks: list[Callback], local: LocalUpdatesCallback) -> None:
    """Raise ValueError for a callback that would replace, at the end of training, what workers have agreed on."""
    names = ("StochasticWeightAveraging", "WeightAveraging")  # the latter from Lightning 2.6 on
    kinds = tuple(getattr(theirs, name) for name in names if hasattr(theirs, name))
    for callback in callbacks[callbacks.index(local) :]:
        if isinstance(callback, kinds):
            raise ValueError(
                f"LocalUpdatesCallback must come after {type(callback).__name__} in callbacks: otherwise every worker "
                f"ends with an average of its own"
            )


def folder_of(checkpoint: str | Path) -> Path:
    """Return the folder of workers' states that belongs to a checkpoint."""
    path = Path(checkpoint)
    return path.with_name(path.name + ".packsaddle")


class _Files:
    """Takes part when a strategy collects, saves or removes a checkpoint.

    Lightning tells callbacks that it saves but not where, and only the strategy hears that on every worker.
    """

    def __init__(self, callback: _Attached) -> None:
        self._callback = callback

    def accompany(self, strategy: Strategy) -> None:
        """Stand before the strategy's three methods, once."""
        if isinstance(getattr(strategy.save_checkpoint, "__self__", None), _Files):  # since an earlier fit
            return
        self._strategy, self._names = strategy, dict[str, str]()
        self._save, self._remove = strategy.save_checkpoint, strategy.remove_checkpoint
        self._tensors = strategy.lightning_module_state_dict
        strategy.save_checkpoint, strategy.remove_checkpoint = self.save, self.remove
        strategy.lightning_module_state_dict = self.tensors

    def save(self, checkpoint: dict[str, Any], filepath: str | Path, *args: Any, **options: Any) -> None:
        """Save this worker's state too, unless the checkpoint is of weights alone.

        A name may have a metric in it, of which every worker has a value of its own: rank 0's is the checkpoint's.
        """
        exchange = self._callback.exchange
        if exchange is not None:
            told = self._strategy.broadcast(str(filepath))
            self._names[str(filepath)] = filepath = told
        if exchange is not None and "callbacks" in checkpoint:
            if "://" in str(filepath):
                warnings.warn(f"{filepath} is not on a disk: packsaddle's state is not saved", stacklevel=2)
            else:
                with self._callback.apart():
                    save_state(exchange, folder_of(filepath))
        with self._callback.together():  # the checkpoint may have the parameters themselves
            self._save(checkpoint, filepath, *args, **options)

    def tensors(self) -> dict[str, Any]:
        """Return the model's `state_dict`, which may make copies, of the model that is the same on all workers."""
        with self._callback.together():
            found: dict[str, Any] = self._tensors()
        return found

    def remove(self, filepath: str | Path) -> None:
        """Remove the workers' states too, where rank 0 removes the checkpoint: others may have chosen another one."""
        filepath = self._names.pop(str(filepath), filepath)
        if self._callback.exchange is not None and self._strategy.is_global_zero:
            shutil.rmtree(folder_of(filepath), ignore_errors=True)
        self._remove(filepath)


class CertificateCallback(Callback):
    """Certifies the model every N epochs or steps (is it at a saddle?) and logs certificate/grad_norm and so on.

    loss_fn(pl_module, batch) is a batch's mean loss, without calls of `log`; `batches` are this worker's, the same each
    time; `options` are those of `packsaddle.certify`. `certificate` is the last one. With a LocalUpdatesCallback in the
    trainer it certifies the anchor.
    Raises ValueError unless one of the two intervals is given.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        batches: Iterable[Any],
        *,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        **options: Any,
    ) -> None:
        if (every_n_epochs is None) == (every_n_steps is None) or (every_n_epochs or every_n_steps or 0) < 1:
            raise ValueError(
                f"give one of every_n_epochs and every_n_steps, at least 1, got {every_n_epochs} and {every_n_steps}"
            )
        self.certificate: Certificate | None = None
        self._loss_fn, self._batches, self._options = loss_fn, batches, options
        self._epochs, self._steps = every_n_epochs, every_n_steps
        self._seen = 0  # steps at the last batch's end

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the steps of a checkpoint on."""
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Certify if the batch ended a step that is due."""
        before, self._seen = self._seen, trainer.global_step
        if self._steps is not None and self._seen // self._steps > before // self._steps:  # each optimizer counts
            self._certify(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Certify if the epoch is due."""
        if self._epochs is not None and (trainer.current_epoch + 1) % self._epochs == 0:
            self._certify(trainer, pl_module)

    def _certify(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def loss_fn(module: nn.Module, batch: Any) -> Tensor:
            return self._loss_fn(module, trainer.strategy.batch_to_device(batch))

        with ExitStack() as stack:
            for callback in trainer.callbacks:
                if isinstance(callback, _Attached):
                    stack.enter_context(callback.together())
            self.certificate = certify(pl_module, loss_fn, self._batches, **self._options)
        for logger in trainer.loggers:
            logger.log_metrics(certificate_scalars(self.certificate), step=trainer.global_step)
