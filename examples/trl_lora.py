"""A LoRA by PEFT under TRL's SFTTrainer: one callback, and workers exchange the changes of the factors alone.

    pip install '.[hf]' trl peft  # in a clone
    torchrun --nproc-per-node 2 examples/trl_lora.py
    torchrun --nproc-per-node 2 examples/trl_lora.py --resume --steps 120

A small GPT-2 from a configuration, so that nothing is downloaded, learns sequences of words. Its weights are frozen and
are compared once, at the start; each worker trains its own copy of the factors and sends one bit of each value after
every 8 steps. Start from your model: MODEL = AutoModelForCausalLM.from_pretrained(NAME), and its own tokenizer.
"""

import argparse
from pathlib import Path

import torch
from common import report
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

from packsaddle.integrations.huggingface import LocalUpdatesCallback

WORDS = ["<end>", *(f"w{i}" for i in range(63))]


def texts(count: int) -> list[str]:
    """Return texts of 16 words, in order, from each of the words."""
    return [" ".join(WORDS[(i + step) % 64] for step in range(16)) for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--out", type=Path, default=Path("runs/trl"))
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --out")
    arguments = parser.parse_args()

    set_seed(0)
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<end>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    config = GPT2Config(
        vocab_size=64,
        n_positions=32,
        n_embd=64,
        n_layer=2,
        n_head=2,
        initializer_range=0.2,  # random weights that a LoRA can use; a pretrained model has better ones
        bos_token_id=None,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)

    training = SFTConfig(
        output_dir=str(arguments.out),
        max_steps=arguments.steps,
        per_device_train_batch_size=16,
        learning_rate=3e-2,
        logging_steps=10,
        save_steps=40,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        ddp_find_unused_parameters=False,  # this and the next would exchange some numbers at every step
        average_tokens_across_devices=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=Dataset.from_dict({"text": texts(1024)}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True),
    )
    callback = LocalUpdatesCallback(trainer, every=8)
    trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=arguments.resume or None)

    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    report(training.process_index, trainer.model, callback.local, trainer.state.global_step, losses)


if __name__ == "__main__":
    main()
