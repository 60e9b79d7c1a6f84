"""Hugging Face Trainer: one callback compresses the exchange, logs it and keeps its state in the checkpoints.

    pip install '.[hf]'  # in a clone
    torchrun --nproc-per-node 2 examples/huggingface_example.py
    torchrun --nproc-per-node 2 examples/huggingface_example.py --resume --steps 120
    torchrun --nproc-per-node 2 examples/huggingface_example.py --local-updates --out runs/huggingface-local
    torchrun --nproc-per-node 2 examples/huggingface_example.py --certify --out runs/huggingface-certified

A small GPT-2 from a configuration, so that nothing is downloaded, on counts modulo 64 with random starts and strides.
With --local-updates workers step by themselves and exchange what they have moved, compressed, after every 8 steps.
With --certify every 20 steps a certificate says whether the point is a saddle of the loss over 64 sequences.
"""

import argparse
from pathlib import Path

import torch
from common import report
from torch.utils.data import Dataset, default_collate
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from packsaddle import Search
from packsaddle.integrations.huggingface import CertificateCallback, LocalUpdatesCallback, PacksaddleCallback


class Counting(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 1024

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start, stride = index % 64, 1 + index // 64 % 4
        tokens = (start + stride * torch.arange(16)) % 64
        return {"input_ids": tokens, "labels": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--out", type=Path, default=Path("runs/huggingface"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--local-updates", action="store_true")
    parser.add_argument("--certify", action="store_true")
    arguments = parser.parse_args()

    set_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=16, n_embd=64, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    training = TrainingArguments(
        output_dir=str(arguments.out),
        max_steps=arguments.steps,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        logging_steps=10,
        save_steps=40,
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,  # this and the next would exchange some numbers at every step
        average_tokens_across_devices=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model=GPT2LMHeadModel(config), args=training, train_dataset=Counting())
    callback: PacksaddleCallback | LocalUpdatesCallback
    if arguments.local_updates:  # noqa: SIM108 -- lines to be copied
        callback = LocalUpdatesCallback(trainer, every=8)
    else:
        callback = PacksaddleCallback(trainer)  # four bits a value
    trainer.add_callback(callback)
    if arguments.certify:
        mine = range(training.process_index, 64, training.world_size)
        batches = [default_collate([trainer.train_dataset[16 * i] for i in mine])]  # this worker's, the same every time
        trainer.add_callback(CertificateCallback(trainer, batches, every_n_steps=20, search=Search(max_hvps=20)))
    trainer.train(resume_from_checkpoint=arguments.resume or None)

    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    exchange = callback.local if isinstance(callback, LocalUpdatesCallback) else callback.hook
    report(training.process_index, trainer.model, exchange, trainer.state.global_step, losses)


if __name__ == "__main__":
    main()
