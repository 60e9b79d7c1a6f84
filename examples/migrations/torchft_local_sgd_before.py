"""torchft's LocalSGD: AdamW on each worker, and the mean of the parameters after every 20 steps.

torchft_lighthouse --min_replicas 2 --join_timeout_ms 10000     # once; then two workers, REPLICA_GROUP_ID 0 and 1
export TORCHFT_LIGHTHOUSE=http://localhost:29510
REPLICA_GROUP_ID=0 torchrun --standalone --nproc-per-node 1 examples/migrations/torchft_local_sgd_before.py
"""

import os
from datetime import timedelta

import torch
from task import batch, loss_of, network, reduced, report
from torchft import Manager, ProcessGroupGloo
from torchft.local_sgd import LocalSGD

STEPS, EVERY = 240, 20
worker = int(os.environ["REPLICA_GROUP_ID"])
model = network()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)


def state_dict():
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def load_state_dict(state):
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


manager = Manager(
    pg=ProcessGroupGloo(timeout=timedelta(seconds=30)),
    load_state_dict=load_state_dict,
    state_dict=state_dict,
    min_replica_size=2,
    use_async_quorum=False,
    replica_id=f"worker_{worker}",
)
with LocalSGD(manager, model, optimizer, sync_every=EVERY):
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, batch(worker, step)).backward()
        optimizer.step()

report(worker, model, reduced(model, STEPS // EVERY))
manager.shutdown(wait=False)
