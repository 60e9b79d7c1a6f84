"""Accelerate's LocalSGD: AdamW on each worker, and the mean of the parameters after every 8 steps.

torchrun --nproc-per-node 2 examples/migrations/accelerate_local_sgd_before.py
"""

import torch
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from task import batch, loss_of, network, reduced, report

STEPS, EVERY = 240, 8
accelerator = Accelerator(cpu=not torch.cuda.is_available())
worker = accelerator.process_index
model = network()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
model, optimizer = accelerator.prepare(model, optimizer)

with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=EVERY) as local_sgd:
    for step in range(STEPS):
        optimizer.zero_grad()
        accelerator.backward(loss_of(model, batch(worker, step)))
        optimizer.step()
        local_sgd.step()

report(worker, model, reduced(model, STEPS // EVERY))
accelerator.end_training()
