"""Lightning: one callback compresses DDPStrategy's exchange, logs it and saves it; another certifies the model.

    pip install '.[lightning,digits]'  # in a clone
    torchrun --nproc-per-node 2 examples/lightning_example.py
    torchrun --nproc-per-node 2 examples/lightning_example.py --resume runs/lightning/last.ckpt --epochs 12
    torchrun --nproc-per-node 2 examples/lightning_example.py --local-updates --out runs/lightning-local

With --local-updates workers step by themselves and exchange what they have moved, compressed, after every 8 steps.

Metrics are in OUT/version_*/metrics.csv.
"""

import argparse
import os
from pathlib import Path

import torch
from common import digits, network, report
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import packsaddle
from packsaddle.integrations.lightning import CertificateCallback, LocalUpdatesCallback, PacksaddleCallback


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = network()
        self.losses: list[float] = []

    def loss(self, batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return cross_entropy(self.network(images), labels)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--local-updates", action="store_true")
    arguments = parser.parse_args()

    seed_everything(0, verbose=False)
    train, test = digits()
    module = Digits()
    callback: PacksaddleCallback | LocalUpdatesCallback
    if arguments.local_updates:  # noqa: SIM108 -- lines to be copied
        callback = LocalUpdatesCallback(every=8)
    else:
        callback = PacksaddleCallback(packsaddle.TopK(0.01))
    certificates = CertificateCallback(
        Digits.loss,
        list(DataLoader(test, batch_size=90)),
        epsilon=2.0,
        search=packsaddle.Search(max_hvps=20),
        every_n_steps=88,
    )
    trainer = Trainer(
        strategy="ddp",
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", 1)),
        max_epochs=arguments.epochs,
        log_every_n_steps=10,
        logger=CSVLogger(arguments.out, name=""),
        callbacks=[callback, certificates, ModelCheckpoint(arguments.out, save_last=True)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loaders = [DataLoader(train, batch_size=32, shuffle=True, drop_last=True), DataLoader(test, batch_size=90)]
    trainer.fit(module, *loaders, ckpt_path=arguments.resume)

    exchange = callback.local if isinstance(callback, LocalUpdatesCallback) else callback.hook
    report(trainer.global_rank, module, exchange, trainer.global_step, module.losses)
    if trainer.is_global_zero:
        print(certificates.certificate)
    trainer.strategy.barrier()


if __name__ == "__main__":
    main()
