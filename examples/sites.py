"""Sites as workers: DistributedDataParallel or FSDP2 within a site, local updates between sites.

    torchrun --nnodes 2 --nproc-per-node 2 --rdzv-endpoint 10.0.0.1:29400 --rdzv-backend c10d examples/sites.py
    torchrun --nproc-per-node 4 examples/sites.py --processes 2 --fsdp     # two sites of two processes, on one machine

Sites that come and go, each with a torchrun of its own, which starts it again if it loses a process:

    torchft_lighthouse --min_replicas 1 --join_timeout_ms 5000
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1        # avoids stale addresses after a restart
    torchrun --standalone --nproc-per-node 2 --max-restarts 9 examples/sites.py --lighthouse http://HOST:29510 --site 0

Gradients are averaged within a site in every step. After every 8 steps each process exchanges its part of the site's
change with its peers, one process in each other site. The model, the data and the loss are local_updates.py's.
"""

import argparse
import os

import torch
import torch.distributed as dist
from common import report
from local_updates import Transformer, counts, loss_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import packsaddle

BATCH = 32  # examples of a site in a step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--processes", type=int, default=int(os.environ.get("LOCAL_WORLD_SIZE", "1")), help="of a site")
    parser.add_argument("--fsdp", action="store_true", help="shard the model over the processes of a site")
    parser.add_argument("--lighthouse", help="http://HOST:PORT, for sites that come and go; this command starts one")
    parser.add_argument("--site", type=int, default=0, help="number of the site that this command starts, for its data")
    arguments = parser.parse_args()

    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_gpu else "gloo")
    torch.manual_seed(0)

    # The lines: a mesh of sites and their processes, and one of these for the workers. All processes of a launch with a
    # lighthouse are one site.
    is_elastic = arguments.lighthouse is not None
    processes = dist.get_world_size() if is_elastic else arguments.processes
    sites = dist.get_world_size() // processes
    mesh = init_device_mesh(device.type, (sites, processes), mesh_dim_names=("sites", "site"))
    (site, process), network = mesh.get_coordinate(), Transformer().to(device)
    workers = packsaddle.comm.connect(arguments.lighthouse, site=True) if is_elastic else mesh
    if arguments.fsdp:
        model = fully_shard(network, mesh=mesh["site"])
    else:
        model = DistributedDataParallel(network, process_group=mesh["site"].get_group())
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    local = packsaddle.LocalUpdates(optimizer, every=8, workers=workers, offload=has_gpu and is_elastic)
    if is_elastic:
        local.join()  # wait for the others' next round, and start at their anchor and step
        sites, site = 1000, arguments.site

    losses = []
    while local.steps < arguments.steps:
        mine = counts(seed=sites * local.steps + site, size=BATCH)  # the site's batch
        mine = mine[process::processes]  # this process's part of it
        optimizer.zero_grad()
        loss = loss_of(model, mine.to(device))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    local.flush()  # exchanges the pending updates
    report(dist.get_rank(), model, local, arguments.steps, losses)
    dist.barrier()  # a worker that leaves early takes its connections away from the others
    if is_elastic:
        os._exit(0)  # torchft's threads need not be waited for
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
