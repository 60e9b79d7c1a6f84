"""Which compressors go with AdamW behind DistributedDataParallel, and which want SGD?

The character transformer of experiments/char-transformer for five passes, one worker with batches of 32 windows.
"""

import sys

import torch
from torch.nn.parallel import DistributedDataParallel

import packsaddle
from packsaddle.config import DataConfig, ModelConfig
from packsaddle.data import Batches, load_data, shard
from packsaddle.exchange import launch, process_group
from packsaddle.models import make_task

COMPRESSORS = {
    "Identity": packsaddle.Identity(),
    "LowRank 4": packsaddle.LowRank(4),
    "QSGD": packsaddle.QSGD(),
    "Sign": packsaddle.Sign(),
    "TopK 10%": packsaddle.TopK(0.1),
    "TopK 1%": packsaddle.TopK(0.01),
    "RandomK 10%": packsaddle.RandomK(0.1),
    "RandomK 1%": packsaddle.RandomK(0.01),
}
OPTIMIZERS = {
    "SGD 0.3": lambda parameters: torch.optim.SGD(parameters, lr=0.3),
    "AdamW 3e-3": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
    "AdamW 1e-3": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}
PASSES, BATCH = 5, 32


def train(compressor: str, optimizer: str, passes: float = PASSES) -> tuple[float, float]:
    """Return the training loss over the last half pass, and the bytes of messages a step."""
    data = load_data(DataConfig("text"), None, train=True)
    cpu = torch.device("cpu")
    with process_group():
        model = DistributedDataParallel(make_task(ModelConfig("char-transformer"), data.shape, data.classes, seed=0))
        opt = OPTIMIZERS[optimizer](model.parameters())
        hook = packsaddle.register_ddp_hook(model, COMPRESSORS[compressor], optimizer=opt)
        batches = Batches(shard(data, "iid", worker=0, workers=1, seed=0), BATCH, worker=0, seed=0)
        steps, losses = round(passes * len(data) / BATCH), []
        for step in range(steps):
            opt.zero_grad()
            loss = model(*data.batch(batches[step], cpu))
            loss.backward()
            opt.step()
            losses.append(loss.detach())
        last = torch.stack(losses[-max(1, steps // (2 * PASSES)) :])
        return float(last.mean()), hook.ledger.total.payload / steps


if __name__ == "__main__":
    for optimizer in sys.argv[1:] or OPTIMIZERS:
        for compressor in COMPRESSORS:
            loss, sent = launch(train, (compressor, optimizer), 1)
            print(f"{optimizer:12} {compressor:12} loss {loss:.3f}, {sent / 1e3:,.1f} kB a step", flush=True)
