"""Callbacks for Hugging Face's Trainer that compress gradients, train with local updates, or check if the model is at a
saddle point.

The callbacks for compressed gradients and local updates log the metrics of `measures`, and save every worker's state in
the checkpoints. This module needs transformers 5: pip install 'packsaddle[hf]'.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

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

# Names of fields of TrainingArguments that, if True, make all workers run a collective at every step. Older versions of
# transformers do not have the field average_tokens_across_devices.
_PER_STEP = ("ddp_find_unused_parameters", "average_tokens_across_devices")


class _Attached(Attached, TrainerCallback):
    """Base callback: attaches a DDP hook or local updates when training begins, logs their metrics, and saves and
    restores their state."""

    def __init__(
        self,
        trainer: Trainer,
        compressor: AnyCompression = Rounded("int4"),  # noqa: B008 -- immutable
        **options: Any,
    ) -> None:
        super().__init__(compressor, options)
        self._trainer = trainer
        # The path of the checkpoint that was passed to `train` as resume_from_checkpoint; None: no path was passed.
        self._resumed: Path | None = None
        self._attached: Any = None  # the wrapped model to which `exchange` is attached
        train, save = trainer.train, trainer._save_checkpoint

        # Wrap `train` to record the checkpoint from which to resume, since callbacks do not receive it.
        @wraps(train)
        def training(resume_from_checkpoint: Any = None, *args: Any, **others: Any) -> Any:
            named = isinstance(resume_from_checkpoint, str | os.PathLike)
            self._resumed = Path(resume_from_checkpoint) if named else None
            return train(resume_from_checkpoint, *args, **others)

        # Wrap the trainer's method that saves a checkpoint, to save this worker's state too. The callback `on_save`
        # would not suffice, since it is not called after a SIGTERM.
        @wraps(save)
        def saving(model: nn.Module, trial: Any = None) -> None:
            save(model, trial)
            if self.exchange is not None and not trainer.args.save_only_model:
                folder = Path(trainer._get_output_dir(trial=trial))  # one folder per trial of a hyperparameter search
                save_state(self.exchange, folder / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}")

        trainer.train, trainer._save_checkpoint = training, saving

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Attach the hook or local updates, and restore their state in a resumed run. Raises the exceptions of `_make`
        and `load_state`."""
        trainer = self._trainer
        # If an earlier call of `train` used the same wrapped model, the hook or local updates are attached already.
        if trainer.model_wrapped is not self._attached:
            # Read the model's wrapper from the trainer, since callbacks receive only the model inside it.
            self._attached = trainer.model_wrapped
            scaler, every = trainer.accelerator.scaler, int(state.logging_steps)
            self.exchange = self._make(self._attached, trainer.model, [trainer.optimizer], scaler, every)
        if state.global_step:
            newest = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            load_state(self.exchange, self._resumed or newest)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Log the metrics of `measures` whenever the training loss is logged."""
        if self.exchange is not None and logs is not None and "loss" in logs:
            self._trainer.log({f"packsaddle/{name}": value for name, value in measures(self.exchange).items()})


class PacksaddleCallback(_Attached):
    """Compresses the gradients that workers exchange, and logs the metrics of `measures` as packsaddle/sent and so on.

    Construct it with the trainer, and add it to the same trainer: `trainer.add_callback(PacksaddleCallback(trainer))`.
    It accepts the arguments of `register_ddp_hook` except `optimizer` and `scaler`, which are the trainer's. The
    contraction, i.e. the fraction of the squared norm that compression keeps, is measured every `logging_steps` steps.
    If `compressor` is a `Compression`, it sets the interval instead.

    Every worker saves its own state in the trainer's checkpoint folders, as packsaddle/worker-RANK.pt. A resumed run
    (`train(resume_from_checkpoint=...)`) restores this state from the checkpoint. With one worker nothing is attached,
    and a warning is issued. `hook` is the DDPHook; further calls of `train` use the same DDPHook.
    """


class LocalUpdatesCallback(_Attached):
    """Trains with `packsaddle.LocalUpdates`: workers step separately and average their changes every `every` steps.

    Construct it with the trainer, and add it to the same trainer: `trainer.add_callback(LocalUpdatesCallback(trainer,
    every=8))`. It accepts the arguments of `LocalUpdates` except `optimizer` and `scaler`, which are the trainer's.
    DistributedDataParallel exchanges no gradients from the start of training. With several workers the trainer's
    TrainingArguments must have `ddp_find_unused_parameters=False` and `average_tokens_across_devices=False`. The
    metrics of `measures` are logged as packsaddle/sent and so on. The contraction, i.e. the fraction of the squared
    norm that compression keeps, is measured in every round. If `compressor` is a `Compression`, it sets the interval
    instead.

    During training the trainer evaluates, predicts with and saves the anchor, i.e. the parameters on which all workers
    last agreed. At the end of training pending updates are exchanged (`LocalUpdates.flush`), after which the parameters
    of every worker are the anchor. With `load_best_model_at_end` every worker has the best model instead, and another
    call of `train` raises RuntimeError.

    Every worker saves its own state, including parameters and optimizer state, in the trainer's checkpoint folders, as
    packsaddle/worker-RANK.pt. A resumed run restores this state as with `PacksaddleCallback`, even if its number of
    workers is different (see `load_checkpoint`). With one worker nothing is sent, and a warning is issued. `local` is
    the LocalUpdates; further calls of `train` use the same LocalUpdates.
    """

    _makes = LocalUpdates

    def __init__(
        self,
        trainer: Trainer,
        *,
        compressor: AnyCompression = Sign(per_tensor=True),  # noqa: B008 -- immutable
        **options: Any,
    ) -> None:
        super().__init__(trainer, compressor, **options)
        # True during training, when evaluation and saving use the anchor, on which all workers last agreed.
        self._at_anchor = False
        self._ended_at_best = False
        # Wrap these methods of the trainer, since callbacks are called only after the methods have run.
        for name in ("evaluate", "predict", "save_model"):
            setattr(trainer, name, self._inside(getattr(trainer, name)))

    def _inside(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def inside(*args: Any, **options: Any) -> Any:
            if self.local is None or not self._at_anchor:
                return method(*args, **options)
            with self.local.at_anchor():
                return method(*args, **options)

        return inside

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Attach local updates, and restore their state in a resumed run. Raises ValueError if there are several
        workers and `args` has a setting with which they wait for each other at every step. Raises RuntimeError if an
        earlier call of `train` with this model has loaded the best model at its end."""
        found = {name: getattr(args, name) for name in _PER_STEP if getattr(args, name, False) is not False}
        if found and args.world_size > 1:
            needed, got = ", ".join(f"{name}=False" for name in found), " and ".join(map(repr, found.values()))
            raise ValueError(
                f"LocalUpdatesCallback needs TrainingArguments({needed}), got {got}: workers would wait for each other "
                f"at every step"
            )
        if self._ended_at_best and self._trainer.model_wrapped is self._attached:
            raise RuntimeError("the best model was loaded after the last training: make a new Trainer to train on")
        super().on_train_begin(args, state, control)
        self._at_anchor = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._at_anchor = False
        self._ended_at_best = bool(args.load_best_model_at_end and state.best_model_checkpoint is not None)
        if isinstance(self.exchange, WorkerState) and not self._ended_at_best:
            self.exchange.finish()


class CertificateCallback(TrainerCallback):
    """Computes a `Certificate`, which bounds the Hessian's smallest eigenvalue, every `every_n_steps` steps. The
    callback logs the certificate's numbers, and prints its verdict, for example that the model is at a saddle point.

    Construct it with the trainer, and add it to the same trainer. The numbers are logged as certificate/grad_norm and
    so on. `certificate` is the last certificate, or None before the first. `loss_fn(model, batch)` returns the mean
    loss of a batch. By default it is the `loss` of `model(**batch)`. `batches` is an iterable of this worker's batches,
    which must be identical in every pass. `options` are further arguments of `packsaddle.certify`. With a
    `LocalUpdatesCallback` in the trainer the anchor, i.e. the parameters on which all workers last agreed, is
    certified. Raises ValueError if `every_n_steps` is below 1.
    """

    def __init__(
        self,
        trainer: Trainer,
        batches: Iterable[Any],
        loss_fn: LossFn | None = None,
        *,
        every_n_steps: int,
        **options: Any,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.certificate: Certificate | None = None
        self._trainer, self._batches, self._loss_fn = trainer, batches, loss_fn
        self._every, self._options = every_n_steps, options

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self._every:
            return
        with ExitStack() as stack:
            for callback in self._trainer.callback_handler.callbacks:
                if isinstance(callback, Attached) and callback.local is not None:
                    stack.enter_context(callback.local.at_anchor())
            self.certificate = certify(self._trainer.model, self._loss, self._batches, progress=False, **self._options)
        self._trainer.log(certificate_scalars(self.certificate))
        if state.is_world_process_zero:
            print(certificate_line(self.certificate, state.global_step), flush=True)

    def _loss(self, model: nn.Module, batch: Any) -> Tensor:
        batch = self._trainer._prepare_inputs(batch)  # moves the batch to the model's device
        if self._loss_fn is not None:
            return self._loss_fn(model, batch)
        # A model of transformers returns a dict with the key "loss", or a tuple whose first element is the loss. Read
        # the loss as transformers' Trainer does.
        outputs = model(**batch)
        loss: Tensor = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
        return loss
