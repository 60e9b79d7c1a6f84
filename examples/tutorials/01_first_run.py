# %% [markdown]
# # A first run
#
# Train a small network on two worker processes from a configuration file, and compare the bytes and the loss with those
# of a run without compression. To use packsaddle in your own training loop, see [start](docs/start.md).
#
# You need a clone of the repository and `pip install '.[plot,digits]'` in it. Run this page with
# `python examples/tutorials/01_first_run.py`. It takes less than a minute and writes to `runs/tutorial-1`.

# %%
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path("runs/tutorial-1")
shutil.rmtree(FOLDER, ignore_errors=True)
FOLDER.mkdir(parents=True)
os.chdir(FOLDER)
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where packsaddle is installed


def shell(command: str) -> None:
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False)
    print(done.stdout)
    if done.returncode:
        raise SystemExit(done.stderr)


# %% [markdown]
# ## A configuration
#
# An autoencoder encodes the 8 x 8 digits of scikit-learn in 10 numbers and reconstructs them. The table `[compressor]`
# makes each worker send the largest 1% of the coordinates of its gradient in each step. The worker keeps the rest of
# the gradient in its error memory, and adds it to the next gradient.
#
# In the second file, for comparison, the compressor `Identity` sends all coordinates.

# %%
CONFIG = """
lr = 1.0
epochs = 10
batch_size = 16       # examples per worker and step
workers = 2
log_every = 25        # steps averaged in one line of metrics

[data]
name = "digits"

[model]
name = "autoencoder"
widths = [256, 10]    # the encoder; the decoder mirrors it

[compressor]
kind = "TopK"
ratio = 0.01
"""
Path("topk.toml").write_text(CONFIG)
Path("dense.toml").write_text(CONFIG.replace("TopK", "Identity").replace("ratio = 0.01\n", ""))

# %% [markdown]
# ## Train
#
# `python -m lab run` starts the worker processes, trains, and writes everything into a new folder.

# %% tags=["varies"]
shell("python -m lab run topk.toml --out runs/topk")

# %% [markdown]
# `MB per worker` are the megabytes that one worker sent, and `compression` is the number of bytes of uncompressed
# gradients divided by the number of bytes sent.
#
# ## The ledger
#
# packsaddle counts the bytes of every exchange by [purpose](docs/metrics.md#names). In a script of your own
# `print(optimizer.ledger)` prints these counts.


# %%
def show_ledger(folder: str) -> None:
    summary = json.loads(Path(folder, "summary.json").read_text())
    print(f"{folder}: test loss {summary['test_loss']:.4f} after {summary['steps']} steps")
    for purpose, moved in summary["bytes_by_purpose"].items():
        if moved["sent"] > summary["sent"] / 1000:
            print(f"  {purpose:8} {moved['sent']:12,} bytes")
    print(f"  {'total':8} {summary['sent']:12,} bytes")


show_ledger("runs/topk")

# %% [markdown]
# `values` are the numbers that TopK kept, and `indices` their positions in the gradient. `dense` counts the biases,
# because vectors are sent uncompressed. `start` is the model, which is sent once so that both workers start with the
# same parameters.
#
# ## The same without compression

# %% tags=["varies"]
shell("python -m lab run dense.toml --out runs/dense")

# %%
show_ledger("runs/dense")

# %% [markdown]
# The compressed run sent 33 times fewer bytes than the uncompressed run, and half of its bytes were for the biases.
# After the same number of steps the loss of the compressed run is a little higher. The difference in loss depends on
# the network, the compressor and the learning rate ([choosing](docs/choosing.md)).
#
# ## A page of both
#
# `python -m lab report` writes one HTML page with charts and configurations, and the numbers as CSV.

# %% tags=["varies"]
shell("python -m lab report runs/topk runs/dense --out report")

# %%
shutil.copy("report/figure.svg", "01_first_run.svg")
print(*sorted(p.name for p in Path("report").iterdir()))

# %% [markdown]
# The page `runs/tutorial-1/report/index.html` shows this figure:
#
# ![Loss and gradient norm of both runs, against epochs and against megabytes](01_first_run.svg)
#
# Plotted against epochs, the compressed run is about an epoch behind the uncompressed run. The plot against
# megabytes has a logarithmic axis: the uncompressed run has sent about 30 times as much as the compressed run.
#
# ## Next
#
# - Train with AdamW and an exchange every 8 steps: [AdamW over a slow
#   link](docs/tutorials/03_adamw_over_a_slow_link.md).
# - Read about every key of the file that `python -m lab init` writes: [configuration](docs/configuration.md).
