"""DistributedDataParallel within each machine, local updates between machines: two networks, each used as it deserves.

    torchrun --nnodes 2 --nproc-per-node 2 --rdzv-endpoint 10.0.0.1:29400 --rdzv-backend c10d examples/machines.py
    torchrun --nproc-per-node 4 examples/machines.py --per-machine 2     # two machines of two processes, on one

Gradients are averaged within a machine in every step. After every 8 steps one process of each machine sends the
machine's change, and hands the mean to the others. The model, the data and the loss are local_updates.py's.
"""

import argparse
import os

import torch
import torch.distributed as dist
from common import report
from local_updates import Transformer, counts, loss_of
from torch.nn.parallel import DistributedDataParallel

import packsaddle

BATCH = 32  # examples of a machine in a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--per-machine", type=int, default=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    arguments = parser.parse_args()

    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if has_gpu else "gloo")
    torch.manual_seed(0)

    # The lines: one group within this machine, one between machines.
    machines = packsaddle.comm.machine_group(arguments.per_machine)
    model = DistributedDataParallel(Transformer().to(device), process_group=machines.within)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    local = packsaddle.LocalUpdates(optimizer, every=8, workers=machines)

    losses = []
    for step in range(arguments.steps):
        mine = counts(seed=machines.size * step + machines.rank, size=BATCH)  # the machine's batch
        mine = mine[dist.get_rank(machines.within) :: arguments.per_machine]  # this process's part of it
        optimizer.zero_grad()
        loss = loss_of(model, mine.to(device))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    local.flush()  # exchanges what is pending: all processes have one model
    report(dist.get_rank(), model, local, arguments.steps, losses)
    dist.barrier()  # a worker that leaves early takes its connections away from the others
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
