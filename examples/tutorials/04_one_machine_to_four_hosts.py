# %% [markdown]
# # From one machine to four hosts
#
# One training script runs on one process, on several processes of a machine, and on several machines. Only the command
# that starts it changes. Here such a script runs with four workers on this machine, and then on four simulated hosts,
# one of which dies.
#
# You need a clone of the repository and `pip install .` in it. Run this page with
# `python examples/tutorials/04_one_machine_to_four_hosts.py`. It takes one to two minutes and writes to
# `runs/tutorial-4`.

# %%
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

FOLDER = Path("runs/tutorial-4")
shutil.rmtree(FOLDER, ignore_errors=True)
FOLDER.mkdir(parents=True)
os.chdir(FOLDER)
# The folder of torchrun and packsaddle, and one thread for each worker.
os.environ |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def start(command: str, **variables: str) -> subprocess.Popen[str]:
    """Start a command as a terminal would, with more environment variables."""
    pipe = subprocess.PIPE
    return subprocess.Popen(shlex.split(command), stdout=pipe, stderr=pipe, text=True, env=os.environ | variables)


# %% [markdown]
# ## The script
#
# `train.py` is an ordinary loop with AdamW:
#
# - `init_process_group("gloo")` joins the workers.
# - Each worker uses its own part of the data, which depends on `rank`.
# - `LocalUpdates` exchanges the changes of the workers' parameters every 10 steps.
# - All workers call `save_checkpoint`, and `load_checkpoint`, which returns None if there is no checkpoint. Each worker
#   writes its own file, with its optimizer state and its error memory (the unsent part of its changes).
#
# The environment variable `DIE_AT` makes the last worker kill itself at the given step, like a machine that fails.

# %%
Path("train.py").write_text("""\
import hashlib, os, signal, sys
from datetime import timedelta
import torch
import packsaddle

torch.distributed.init_process_group("gloo", timeout=timedelta(minutes=5))
rank, workers = torch.distributed.get_rank(), torch.distributed.get_world_size()

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
data = torch.randn(2048, 8) @ torch.randn(8, 64)
mine = data[rank::workers]

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
local = packsaddle.LocalUpdates(optimizer, every=10)
parts = {"model": model, "optimizer": optimizer, "local": local}
folder = sys.argv[1]
found = packsaddle.load_checkpoint(folder, parts)
if found and rank == 0:
    print(f"resumes from step {found.step}")

for step in range(found.step if found else 0, 100):
    if step == int(os.environ.get("DIE_AT", -1)) and rank == workers - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    batch = mine[torch.randint(len(mine), (32,), generator=torch.Generator().manual_seed(step))]
    optimizer.zero_grad()
    torch.nn.functional.mse_loss(model(batch), batch).backward()
    optimizer.step()
    if (step + 1) % 25 == 0:
        packsaddle.save_checkpoint(folder, parts, step=step + 1)

local.flush()  # all workers have one model
if rank == 0:
    with torch.no_grad():
        loss = torch.nn.functional.mse_loss(model(data), data).item()
    weights = torch.cat([p.detach().flatten() for p in model.parameters()]).numpy().tobytes()
    print(f"{workers} workers, loss {loss:.3f}, weights {hashlib.sha256(weights).hexdigest()[:12]}")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
""")

# %% [markdown]
# ## Four workers on this machine
#
# `--standalone` means that no other machine takes part. The script prints a digest of the weights, to compare it with
# that of a later run.

# %% tags=["varies"]
whole, errors = start("torchrun --standalone --nproc-per-node 4 train.py checkpoints/one").communicate()
print(whole or errors)

# %% [markdown]
# ## Check the network
#
# On several machines most first runs fail because each gloo worker announces the address of its machine's name. On many
# systems this address is 127.0.0.1, which no other machine can reach. `packsaddle doctor` shows the address:

# %% tags=["varies"]
report, _ = start("packsaddle doctor").communicate()
lines = report.splitlines()
first, last = (next(i for i, line in enumerate(lines) if line[4:].startswith(w)) for w in ("network", "exchange"))
print("\n".join(lines[first:last]))

# %% [markdown]
# If there is a `!` before `gloo`, set `GLOO_SOCKET_IFNAME` on each machine to the name of the network card to use.
#
# ## Four hosts, on one machine
#
# With several machines you start torchrun once on each machine, with its own `--node-rank` and the address of the first
# machine as `--master-addr`. The function below does this on one machine, with its loopback card `lo`.


# %%
def four_hosts(**variables: str) -> list[tuple[str, str]]:
    """Start four hosts and wait; return what each printed, and its errors."""
    with socket.socket() as free:  # a port that nobody uses
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = f"torchrun --nnodes 4 --master-addr 127.0.0.1 --master-port {port}"
    variables["GLOO_SOCKET_IFNAME"] = "lo"
    hosts = [start(f"{command} --node-rank {node} train.py checkpoints/four", **variables) for node in range(4)]
    return [host.communicate() for host in hosts]


# %% [markdown]
# ## A host dies
#
# The last host receives SIGKILL at step 60:

# %% tags=["varies"]
for node, (_, errors) in enumerate(four_hosts(DIE_AT="60")):
    found = re.search(r"PeerLostError: .*?\)|exitcode .*SIGKILL.*", errors)
    print(f"host {node}:", found[0] if found else errors)
for folder in sorted(Path("checkpoints/four").iterdir()):
    print(folder, *sorted(path.name for path in folder.glob("*.pt")))

# %% [markdown]
# At their next exchange the other hosts get no answer from the dead host, and end within seconds. The checkpoint of
# step 50 is complete, with one file for each worker.
#
# ## Start again
#
# Start the same commands again, and the training resumes at step 50:

# %% tags=["varies"]
resumed = four_hosts()
for node, (output, errors) in enumerate(resumed):
    print(f"host {node}:", output.replace("\n", "; ") or errors or "done")

# %%
digests = [re.findall(r"weights (\w+)", text) for text in (whole, resumed[0][0])]
print("the weights are those of the run on one machine:", digests[0] == digests[1] != [])

# %% [markdown]
# The weights equal those of the run without a failure, bit for bit. With `--max-restarts 3` torchrun restarts the
# workers automatically ([how](docs/multi-node.md#when-a-machine-is-late-or-gone)).
#
# ## Four machines
#
# In these commands 10.0.0.1 is the first machine's address, and `eth0` is the network card. Each machine has the
# script, and the same versions of Python, torch and packsaddle. Check the network first, on all four machines with
# `--node-rank` 0 to 3:
#
#     export GLOO_SOCKET_IFNAME=eth0
#     torchrun --nnodes 4 --node-rank 0 --master-addr 10.0.0.1 -m packsaddle.cli doctor
#
# Then train:
#
#     torchrun --nnodes 4 --node-rank 0 --master-addr 10.0.0.1 train.py checkpoints/four
#
# If the training waits forever at the start, a firewall may be between the machines. To find out, try
# `nc -vz 10.0.0.1 29500` on the second machine. Use a network that you trust, since whoever can reach these ports can
# join the run ([ports, and who may connect](docs/multi-node.md#ports-and-who-may-connect)). The checkpoint folder need
# not be shared, unless you continue with fewer machines.
#
# ## Next
#
# - Read about network cards, ports, timeouts and rendezvous: [several machines](docs/multi-node.md).
# - Let machines join and leave during training: [elastic workers](docs/elastic.md).
# - Find out whether compression pays on your link: [AdamW over a slow
#   link](docs/tutorials/03_adamw_over_a_slow_link.md).
