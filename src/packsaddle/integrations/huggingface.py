"""Hugging Face's Trainer: a callback that compresses the exchange of its gradients, logs it and keeps its state.

The Trainer makes DistributedDataParallel itself and has no argument for a communication hook. Needs transformers 5:
pip install 'packsaddle[hf]'.
"""

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from packsaddle.compressors import Compressor, TopK
from packsaddle.integrations.callbacks import attach_among_workers, load_state, measures, monitored, save_state
from packsaddle.optim.compression import Compression, Schedule
from packsaddle.optim.ddp import DDPHook


class PacksaddleCallback(TrainerCallback):
    """Exchanges gradients compressed from the start of training, and logs `measures` as packsaddle/sent and so on.

    To be added to the trainer it is given: `trainer.add_callback(PacksaddleCallback(trainer, TopK(0.1)))`.
    Takes what `register_ddp_hook` takes, but for `optimizer` and `scaler`, which are the trainer's. The contraction
    is measured every `logging_steps`; a `Compression` says itself when.

    Every worker keeps its own state in the trainer's checkpoint folders, as packsaddle-RANK.pt. A run that goes on
    (`train(resume_from_checkpoint=...)`) takes it from the folder of its step in `output_dir`, or from `resume_from`.
    With one worker a warning is all that happens. `hook` is the DDPHook, which another call of `train` goes on with.
    """

    def __init__(
        self,
        trainer: Trainer,
        compressor: Compressor | Schedule | Compression = TopK(0.1),  # noqa: B008 -- immutable
        *,
        resume_from: str | Path | None = None,
        **options: Any,
    ) -> None:
        self.hook: DDPHook | None = None
        self._trainer, self._compressor, self._options = trainer, compressor, options
        self._resume_from = resume_from
        self._attached: Any = None  # to this model

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Attach the hook, and restore it in a run that goes on; raises what `register_ddp_hook` raises."""
        trainer = self._trainer  # callbacks are shown the model that is inside DistributedDataParallel alone
        if trainer.model_wrapped is not self._attached:  # it is the same at another call of train()
            self._attached = trainer.model_wrapped
            options = {"scaler": trainer.accelerator.scaler, **self._options}
            spec = monitored(self._compressor, int(state.logging_steps))
            optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # in Accelerate's
            self.hook = attach_among_workers(self._attached, spec, [optimizer], **options)
        if self.hook is not None and state.global_step:
            load_state(self.hook, self._resume_from or _checkpoint(args, state))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Log beside the training loss, and only there."""
        if self.hook is not None and logs is not None and "loss" in logs:
            self._trainer.log({f"packsaddle/{name}": value for name, value in measures(self.hook).items()})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save this worker's state in the checkpoint that has just been made."""
        if self.hook is not None and not args.save_only_model:
            save_state(self.hook, _checkpoint(args, state))


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
