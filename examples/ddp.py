"""An ordinary DistributedDataParallel loop, and the line that compresses its exchange.

    pip install '.[digits]'  # in a clone
    torchrun --nproc-per-node 2 examples/ddp.py

With --checkpoint FOLDER the run is saved there after every epoch, and goes on from there when started again.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from common import digits, network, report
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import packsaddle
from packsaddle.integrations import load_state, save_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--checkpoint", type=Path)
    arguments = parser.parse_args()

    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if has_gpu else "gloo")
    torch.manual_seed(0)

    train, test = digits()
    sampler = DistributedSampler(train, seed=0)
    loader = DataLoader(train, batch_size=32, sampler=sampler, drop_last=True)
    model = DistributedDataParallel(network().to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    # The line: 1% of the coordinates travel, and what is left behind is added to the next gradient.
    hook = packsaddle.register_ddp_hook(model, packsaddle.TopK(0.01), optimizer=optimizer)

    start, losses = 0, []
    if arguments.checkpoint and (arguments.checkpoint / "model.pt").exists():
        saved = torch.load(arguments.checkpoint / "model.pt", map_location=device, weights_only=True)
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["epoch"]
        load_state(hook, arguments.checkpoint)

    for epoch in range(start, arguments.epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            loss = cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if arguments.checkpoint:
            save_state(hook, arguments.checkpoint)  # every worker its own
            if dist.get_rank() == 0:
                states = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
                torch.save(states, arguments.checkpoint / "model.pt")
            dist.barrier()

    report(dist.get_rank(), model, hook, arguments.epochs * len(loader), losses)
    if dist.get_rank() == 0:
        images, labels = (t.to(device) for t in test.tensors)
        with torch.no_grad():
            accuracy = (model.module(images).argmax(1) == labels).double().mean().item()
        print(f"test accuracy {accuracy:.1%}")
    dist.barrier()  # a worker that leaves early takes its connections away from the others
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
