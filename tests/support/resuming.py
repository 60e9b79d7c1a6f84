"""Run under torchrun by test_integrations: a run that is stopped and goes on, beside one that is not, by framework.

Each worker prints a line of JSON. With scope="model" both must be equal bit for bit, and not without the saved files.
"""

import hashlib
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import packsaddle

Run = tuple[nn.Module, Any, Callable[[], Any] | None]  # the model, the hook, and how to train once more
OPTIONS: dict[str, Any] = {"noise": 0.001, "scope": "model"}
STOP, END = 6, 12


def digest(model: nn.Module) -> str:
    vector = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    return hashlib.sha256(vector.numpy().tobytes()).hexdigest()


def lightning(folder: Path, steps: int, resume: bool) -> Run:
    from lightning.pytorch import Trainer, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger
    from lightning_example import Digits, digits
    from torch.utils.data import DataLoader

    from packsaddle.integrations.lightning import CertificateCallback, PacksaddleCallback

    seed_everything(0, verbose=False)
    module, callback = Digits(), PacksaddleCallback(packsaddle.TopK(0.01), **OPTIONS)
    kept = 1 if steps == END and not resume else -1
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=3, save_top_k=kept, save_last="link")
    for wrong in ({}, {"every_n_steps": 1, "every_n_epochs": 1}, {"every_n_steps": 0}):
        with pytest.raises(ValueError, match="give one of every_n_epochs and every_n_steps, at least 1"):
            CertificateCallback(Digits.loss, [], epsilon=1.0, **wrong)
    example = [tuple(t[:50] for t in digits()[1].tensors)]
    certificates = CertificateCallback(Digits.loss, example, epsilon=9.0, max_hvps=2, every_n_steps=5)
    trainer = Trainer(
        strategy="ddp",
        accelerator="cpu",
        devices=2,
        max_epochs=-1,
        max_steps=steps,
        logger=CSVLogger(folder, name="log", version=""),
        callbacks=[callback, certificates, keep],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(digits()[0], batch_size=240)  # three steps an epoch
    start = folder / f"step={STOP}.ckpt" if (folder / f"step={END}.ckpt").exists() else folder / "last.ckpt"  # a link
    trainer.fit(module, loader, ckpt_path=start if resume else None)
    return module, callback.hook, None


def huggingface(folder: Path, steps: int, resume: bool) -> Run:
    from huggingface_example import Counting
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

    from packsaddle.integrations.huggingface import PacksaddleCallback

    set_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None
    )
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        save_steps=STOP,
        save_total_limit=1 if steps == END and not resume else None,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model=GPT2LMHeadModel(config), args=arguments, train_dataset=Counting())
    callback = PacksaddleCallback(trainer, packsaddle.TopK(0.05), **OPTIONS)
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STOP}") if resume else None)
    return trainer.model, callback.hook, trainer.train


def accelerate(folder: Path, steps: int, resume: bool) -> Run:
    from accelerate import Accelerator
    from common import digits, network
    from torch.utils.data import DataLoader

    from packsaddle.integrations import load_state, save_state

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(digits()[0], batch_size=60))
    hook = packsaddle.attach(model, packsaddle.TopK(0.01), optimizer=optimizer, **OPTIONS)
    assert hook is not None
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: save_state(hook, folder))
    accelerator.register_load_state_pre_hook(lambda models, folder: load_state(hook, folder))
    if resume:
        accelerator.load_state(str(folder))
    for step, (images, labels) in enumerate(loader):
        if hook.steps <= step < steps:
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(images), labels))
            optimizer.step()
        if step + 1 == STOP and not resume:
            accelerator.save_state(str(folder))
    return model, hook, None


def main(run: Callable[[Path, int, bool], Run], folder: Path) -> None:
    straight, hook, _ = run(folder / "straight", END, False)
    first, *_ = run(folder / "parts", STOP, False)
    resumed, again, _ = run(folder / "parts", END, True)
    found: dict[str, Any] = {"straight": digest(straight), "first": digest(first), "resumed": digest(resumed)}
    found |= {"steps": [hook.steps, again.steps], "bytes": [h.ledger.total.payload for h in (hook, again)]}
    for states in list((folder / "parts").rglob(f"packsaddle-{hook.channel.group.rank}.pt")):
        states.rename(states.with_suffix(".lost"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lost, hook, train_again = run(folder / "parts", END, True)
    found["lost"] = digest(lost)
    found["warned"] = sum("its error memory starts at zero" in str(w.message) for w in caught)
    if train_again is not None:
        before = hook.steps
        train_again()
        found["steps of another training"] = hook.steps - before
    print(json.dumps(found) + "\n", end="", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    main(globals()[sys.argv[1]], Path(sys.argv[2]))
