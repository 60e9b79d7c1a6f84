"""A small transformer trained by workers that come and go: start more, kill some, and the others train on.

    pip install '.[torchft]'  # in a clone
    torchft_lighthouse --min_replicas 1 --join_timeout_ms 5000        # on one machine, once
    python examples/elastic.py --lighthouse http://HOST:29510         # as often as there are workers, on any machine

A worker that is told to stop (SIGTERM, Ctrl-C's kin of spot machines) sends its unsent updates in one more round. The
model, the data and the loss are local_updates.py's.
Exit code 2 with one line if something is missing.
"""

import argparse
import os
import sys
import zlib

import torch
from common import report
from local_updates import Transformer, counts, loss_of

import packsaddle
from packsaddle.comm import connect
from packsaddle.errors import ConfigError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lighthouse", help="http://HOST:PORT; by default the variable TORCHFT_LIGHTHOUSE")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--min-workers", type=int, default=1)
    parser.add_argument("--weigh", action="store_true", help="workers differ in speed: weigh them by their steps")
    arguments = parser.parse_args()

    try:
        train(arguments)
    except ConfigError as error:
        sys.exit(_said(str(error)))
    sys.stdout.flush()
    os._exit(0)  # torchft's threads need not be waited for


def _said(line: str) -> int:
    print(f"elastic.py: error: {line}", file=sys.stderr)
    return 2


def train(arguments: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    manager = connect(arguments.lighthouse, min_workers=arguments.min_workers)
    elastic = packsaddle.Elastic(manager, weight="steps" if arguments.weigh else None)
    local = packsaddle.LocalUpdates(optimizer, every=8, workers=elastic)

    # Wait for the others, and have their anchor, outer state, step and position. Each worker has data of its own.
    local.join()
    mine, losses = zlib.crc32(os.urandom(8)), []
    while local.rounds < arguments.rounds:
        optimizer.zero_grad()
        loss = loss_of(model, counts(seed=(mine << 20) + local.steps))
        loss.backward()
        optimizer.step()  # counted; the steps after which a round is due do it, with whoever is there
        losses.append(loss.item())
        if local.exchanging:
            print(f"round {local.rounds}: loss {losses[-1]:.3f}, {local.workers} workers", flush=True)

    local.flush()  # exchanges the pending updates of all present workers
    if losses:
        report(0, model, local, local.steps, losses)
    manager.shutdown(wait=False)


if __name__ == "__main__":
    main()
