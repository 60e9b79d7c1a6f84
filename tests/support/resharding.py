"""Run by test_resharding on any number of workers: local updates in a framework that continue from a checkpoint.

    resharding.py FRAMEWORK FOLDER STEPS

Trains to a step, from the newest checkpoint in FOLDER if there is one. Rank 0 writes start-STEPS.pt and end-STEPS.pt:
the anchor, y and the bytes.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch

import packsaddle

OPTIONS: dict[str, Any] = {"every": 4, "compressor": packsaddle.TopK(0.05)}
WORKERS = int(os.environ.get("WORLD_SIZE", 1))


def record(local: packsaddle.LocalUpdates, model: torch.nn.Module, path: Path) -> None:
    """Write a file with the anchor a and y = a - error(), both by parameter, the parameters' names, and the bytes.

    Collective.
    """
    trained = [p for optimizer in local.optimizers for group in optimizer.param_groups for p in group["params"]]
    names = {id(p): name for name, p in model.named_parameters()}
    anchor, error = local.anchor(), local.error()
    parts = error.split([a.numel() for a in anchor.values()])
    y = {name: a - e.view_as(a) for (name, a), e in zip(anchor.items(), parts, strict=True)}
    if int(os.environ.get("RANK", 0)) == 0:
        counted = {"steps": local.steps, "sent": local.ledger.sent, "alone": local.uncompressed.sent}
        torch.save({"anchor": anchor, "y": y, "names": [names[id(p)] for p in trained], **counted}, path)


def lightning(folder: Path, steps: int) -> None:
    from lightning.pytorch import Callback, Trainer, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning_example import Digits, digits
    from torch.utils.data import DataLoader

    from packsaddle.integrations.lightning import LocalUpdatesCallback

    callback = LocalUpdatesCallback(**OPTIONS)

    class Recorder(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            record(callback.local, pl_module, folder / f"start-{steps}.pt")

    seed_everything(0, verbose=False)
    module = Digits()
    trainer = Trainer(
        strategy="ddp",
        accelerator="cpu",
        devices=WORKERS,
        max_epochs=-1,
        max_steps=steps,
        logger=False,
        callbacks=[callback, Recorder(), ModelCheckpoint(folder, filename="{step}", every_n_train_steps=steps)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    newest = max(folder.glob("step=*.ckpt"), key=lambda path: path.stat().st_mtime, default=None)
    trainer.fit(module, DataLoader(digits()[0], batch_size=24), ckpt_path=newest)
    record(callback.local, module, folder / f"end-{steps}.pt")


def huggingface(folder: Path, steps: int) -> None:
    from huggingface_example import Counting
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

    from packsaddle.integrations.huggingface import LocalUpdatesCallback

    set_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        save_steps=2,
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=Counting())
    callback = LocalUpdatesCallback(trainer, **OPTIONS)

    class Recorder(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            record(callback.local, trainer.model, folder / f"start-{steps}.pt")

    trainer.add_callback(callback)
    trainer.add_callback(Recorder())
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")) or None)
    record(callback.local, trainer.model, folder / f"end-{steps}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    globals()[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
