"""DeepSpeed's 1-bit Adam, up to DeepSpeed 0.19.6 on GPUs: momentum in 1 bit a coordinate after 60 uncompressed steps.

deepspeed --num_gpus 2 examples/migrations/deepspeed_onebit_adam_before.py
"""

import deepspeed
from task import batch, loss_of, network, report

STEPS = 240
model = network()
engine, _, _, _ = deepspeed.initialize(
    model=model,
    model_parameters=model.parameters(),
    config={
        "train_micro_batch_size_per_gpu": 32,
        "optimizer": {"type": "OneBitAdam", "params": {"lr": 2e-3, "freeze_step": 60}},
    },
)
worker = deepspeed.comm.get_rank()

for step in range(STEPS):
    engine.backward(loss_of(engine, [part.to(engine.device) for part in batch(worker, step)]))
    engine.step()

numbers = sum(p.numel() for p in model.parameters())
report(worker, model.cpu(), 60 * 4 * numbers + (STEPS - 60) * numbers // 8)
