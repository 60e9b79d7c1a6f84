"""Accelerate: attach after `prepare`, and have `save_state` and `load_state` take the hook along.

    pip install '.[hf,digits]'  # in a clone
    torchrun --nproc-per-node 2 examples/accelerate_example.py
    torchrun --nproc-per-node 2 examples/accelerate_example.py --checkpoint runs/accelerate --epochs 12

With --checkpoint FOLDER the run is saved there after every epoch, and goes on from there when started again.
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from common import digits, network, report
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import packsaddle
from packsaddle.integrations import load_state, save_state


class Progress:
    """How far the run is, for Accelerate's checkpoints."""

    def __init__(self) -> None:
        self.epoch = 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--checkpoint", type=Path)
    arguments = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    train, _ = digits()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    # The added line. Accelerate's own argument `comm_hook` supports only torch's hooks, and silently ignores others.
    hook = packsaddle.attach(model, packsaddle.TopK(0.01), optimizer=optimizer, scaler=accelerator.scaler)

    progress, losses, steps = Progress(), [], 0
    accelerator.register_for_checkpointing(progress)
    if hook is not None:  # several workers: each keeps its own file in the folder
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: save_state(hook, folder))
        accelerator.register_load_state_pre_hook(lambda models, folder: load_state(hook, folder))
    if arguments.checkpoint and arguments.checkpoint.exists():
        accelerator.load_state(str(arguments.checkpoint))

    while progress.epoch < arguments.epochs:
        loader.set_epoch(progress.epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
            steps += 1
        progress.epoch += 1
        if arguments.checkpoint:
            accelerator.save_state(str(arguments.checkpoint))

    report(accelerator.process_index, model, hook, steps, losses)
    accelerator.end_training()


if __name__ == "__main__":
    main()
