"""A script that test_frameworks runs under torchrun: one run is stopped and resumed, a second one is uninterrupted.

    resuming.py FRAMEWORK FOLDER [local]

Each worker prints a line of JSON. With scope="model", and with local updates, both runs must be bitwise identical; if
the saved files are missing, they must differ.
"""

import hashlib
import json
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import packsaddle
from packsaddle.comm.group import resolve
from packsaddle.curvature import Search
from packsaddle.integrations import callbacks

Run = tuple[nn.Module, Any, Callable[[], Any] | None]  # the model, the exchange, and how to train once more
OPTIONS: dict[str, Any] = {"noise": 0.001, "scope": "model"}
STOP, END = 6, 12
# When the run is stopped, the exchange of one fragment is pending, and no worker's parameters equal the anchor.
LOCAL: dict[str, Any] = {"every": 4, "compressor": packsaddle.TopK(0.05), "overlap": packsaddle.Overlap(3, 2)}
local = best = False
evaluated: list[str] = []  # digests of the models that were evaluated
certified: list[str] = []  # digests of the models that were certified first


def digest(model: nn.Module) -> str:
    vector = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    return hashlib.sha256(vector.numpy().tobytes()).hexdigest()


def lightning(folder: Path, steps: int, resume: bool) -> Run:
    from lightning.pytorch import Callback, Trainer, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger
    from lightning_example import Digits, digits
    from torch.utils.data import DataLoader

    from packsaddle.integrations.lightning import CertificateCallback, LocalUpdatesCallback, PacksaddleCallback

    class Evaluated(Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            evaluated.append(digest(pl_module))
            if trainer.global_step == STOP and not resume:
                trainer.save_checkpoint(folder / "in_validation.ckpt")

    seed_everything(0, verbose=False)
    module = Digits()
    callback = LocalUpdatesCallback(**LOCAL) if local else PacksaddleCallback(packsaddle.TopK(0.01), **OPTIONS)
    kept = 1 if steps == END and not resume else -1
    # The loss in the checkpoint's name differs between workers, so without agreement the names would differ too.
    keep = ModelCheckpoint(
        folder, filename="{step}-{loss:.9f}", every_n_train_steps=3, save_top_k=kept, save_last="link"
    )
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        CertificateCallback(Digits.loss, [], epsilon=1.0, every_n_steps=0)
    example = [tuple(t[:50] for t in digits()[1].tensors)]

    def loss(of: Any, batch: Any) -> torch.Tensor:
        if local and not certified:
            certified.append(digest(module))
        return Digits.loss(of, batch)

    certificates = CertificateCallback(loss, example, epsilon=9.0, search=Search(max_hvps=2), every_n_steps=5)
    trainer = Trainer(
        strategy="ddp",
        accelerator="cpu",
        devices=2,
        max_epochs=-1,
        max_steps=steps,
        logger=CSVLogger(folder, name="log", version=""),
        callbacks=[callback, certificates, keep, *([Evaluated()] if local else [])],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(digits()[0], batch_size=240)  # three steps an epoch
    ended = any(folder.glob(f"step={END}-*.ckpt"))
    start = next(folder.glob(f"step={STOP}-*.ckpt"), None) if ended else folder / "last.ckpt"  # a link
    test = DataLoader(digits()[1], batch_size=180) if local else None
    trainer.fit(module, loader, test, ckpt_path=start if resume else None)
    return module, callback.local if local else callback.hook, None


def huggingface(folder: Path, steps: int, resume: bool) -> Run:
    from huggingface_example import Counting
    from torch.utils.data import Subset
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments, set_seed

    from packsaddle.integrations.huggingface import LocalUpdatesCallback, PacksaddleCallback

    class Evaluated(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            evaluated.append(digest(model))

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
        eval_strategy="steps" if local else "no",
        eval_steps=STOP if best else 3,
        load_best_model_at_end=best,
        ddp_find_unused_parameters=False if local else None,
        average_tokens_across_devices=not local,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    counts = Counting()
    trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=counts, eval_dataset=Subset(counts, range(8)))
    callback: Any = PacksaddleCallback(trainer, packsaddle.TopK(0.05), **OPTIONS)
    if local:
        callback = LocalUpdatesCallback(trainer, **LOCAL)
        trainer.add_callback(Evaluated())
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STOP}") if resume else None)
    return trainer.model, callback.local if local else callback.hook, trainer.train


def accelerate(folder: Path, steps: int, resume: bool) -> Run:
    from accelerate import Accelerator
    from common import digits, network
    from torch.utils.data import DataLoader

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(digits()[0], batch_size=60))
    exchange: Any
    if local:
        exchange = packsaddle.LocalUpdates(optimizer, scaler=accelerator.scaler, **LOCAL)
        callbacks.keep_gradients_local(model)
        kept = callbacks.WorkerState(exchange, model, accelerator.scaler)
    else:
        exchange = kept = packsaddle.attach(model, packsaddle.TopK(0.01), optimizer=optimizer, **OPTIONS)
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: callbacks.save_state(kept, folder))
    if not local:
        accelerator.register_load_state_pre_hook(lambda models, folder: callbacks.load_state(kept, folder))
    if resume:
        accelerator.load_state(str(folder))
        if local:
            callbacks.load_state(kept, folder)
    for step, (images, labels) in enumerate(loader):
        if exchange.steps <= step < steps:
            optimizer.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(images), labels))
            optimizer.step()
        if local and (step + 1) % 3 == 0:
            with exchange.at_anchor():
                evaluated.append(digest(model))
        if step + 1 == STOP and not resume:
            accelerator.save_state(str(folder))
    if local:
        kept.finish()
    return model, exchange, None


def lightnings(name: str, folder: Path) -> nn.Module:
    """Return the model in a checkpoint of Lightning."""
    from lightning_example import Digits

    module = Digits()
    (path,) = folder.glob(name)
    module.load_state_dict(torch.load(path, weights_only=False)["state_dict"])
    return module


def huggingfaces(folder: Path) -> nn.Module:
    """Return the model in a checkpoint of Hugging Face's Trainer."""
    from transformers import GPT2LMHeadModel

    model: nn.Module = GPT2LMHeadModel.from_pretrained(folder / f"checkpoint-{STOP}")
    return model


SAVED: dict[Any, list[Callable[[Path], nn.Module]]] = {
    lightning: [partial(lightnings, f"step={STOP}-*.ckpt"), partial(lightnings, "in_validation.ckpt")],
    huggingface: [huggingfaces],
}


def main(run: Callable[[Path, int, bool], Run], folder: Path) -> None:
    straight, exchange, _ = run(folder / "straight", END, False)
    found: dict[str, Any] = {"straight": digest(straight), "evaluated": evaluated.copy(), "certified": certified.copy()}
    first, *_ = run(folder / "parts", STOP, False)
    if local and run is not accelerate:
        found["saved"] = [digest(saved(folder / "parts")) for saved in SAVED[run]]
    resumed, again, _ = run(folder / "parts", END, True)
    found |= {"first": digest(first), "resumed": digest(resumed)}
    found |= {"steps": [exchange.steps, again.steps], "bytes": [h.ledger.total.payload for h in (exchange, again)]}
    for states in list((folder / "parts").rglob("packsaddle*")) if resolve(None).rank == 0 else ():
        states.rename(states.with_name("lost"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lost, exchange, train_again = run(folder / "parts", END, True)
    found["lost"] = digest(lost)
    found["warned"] = sum("has no state of packsaddle's" in str(w.message) for w in caught)
    if train_again is not None:
        before = exchange.steps
        train_again()
        found["steps of another training"] = exchange.steps - before
        found["after another training"] = digest(lost)
    if local:
        LOCAL["every"] = 100
        apart, *_ = run(folder / "apart", END, False)
        found["apart until the end"] = digest(apart)
        callbacks.keep_gradients_local = lambda model: None
        with pytest.raises(RuntimeError, match="either they are exchanged as well"):
            run(folder / "exchanged twice", END, False)
    if local and run is huggingface:
        global best
        best, LOCAL["every"] = True, 4
        callbacks.keep_gradients_local = packsaddle.keep_gradients_local
        model, _, train_again = run(folder / "best", END, False)
        found["best"] = [digest(model), evaluated[-1]]  # the last evaluation was the best
        assert train_again is not None
        with pytest.raises(RuntimeError, match="make a new Trainer to train on"):
            train_again()
    print(json.dumps(found) + "\n", end="", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    local = sys.argv[3:] == ["local"]
    main(globals()[sys.argv[1]], Path(sys.argv[2]))
