"""Accelerate and local updates: two lines after `prepare`, and each worker's own state beside Accelerate's checkpoint.

    pip install '.[hf,digits]'  # in a clone
    torchrun --nproc-per-node 2 examples/accelerate_local_updates.py
    torchrun --nproc-per-node 2 examples/accelerate_local_updates.py --checkpoint runs/accelerate-local --epochs 12

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
from packsaddle.integrations import WorkerState, load_state, save_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--checkpoint", type=Path)
    arguments = parser.parse_args()

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    train, test = digits()
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loader = DataLoader(train, batch_size=32, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    # The two lines: DistributedDataParallel leaves each worker its own gradient, and workers exchange what they moved.
    packsaddle.keep_gradients_local(model)
    local = packsaddle.LocalUpdates(optimizer, every=8, scaler=accelerator.scaler)

    # Accelerate saves worker 0's model and optimizer and loads them on all; each worker's own come after that.
    own = WorkerState(local, model, scaler=accelerator.scaler)
    accelerator.register_save_state_pre_hook(lambda models, weights, folder: save_state(own, folder))
    if arguments.checkpoint and arguments.checkpoint.exists():
        accelerator.load_state(str(arguments.checkpoint))
        load_state(own, arguments.checkpoint)

    losses = []
    for epoch in range(local.steps // len(loader), arguments.epochs):
        loader.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            loss = cross_entropy(model(images), labels)
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        if arguments.checkpoint:
            accelerator.save_state(str(arguments.checkpoint))
        with local.at_anchor(), torch.no_grad():  # the model that all workers have in common
            images, labels = (t.to(accelerator.device) for t in test.tensors)
            accuracy = (model(images).argmax(1) == labels).double().mean().item()
        accelerator.print(f"epoch {epoch}: test accuracy {accuracy:.1%}")

    own.finish()  # exchanges the pending updates
    report(accelerator.process_index, model, local, local.steps, losses)
    accelerator.end_training()


if __name__ == "__main__":
    main()
