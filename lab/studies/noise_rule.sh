#!/usr/bin/env bash
# Runs of half a minute to one on an idle core: bash lab/studies/noise_rule.sh DATA_DIR OUT
set -euo pipefail
here=experiments/noise-rule
train() { # data dir, out, eta, epochs, r, seed
    python -m lab run "$here/config.toml" --data-dir "$1" --out "$2/lr-$3-r-$5-seed-$6" --checkpoint-every 0 \
        --set lr="$3" epochs="$4" noise.std="$5" seed="$6" label="eta $3, r $5"
}
for r in 0 1e-4 3e-4 1e-3 3e-3 1e-2; do train "$1" "$2" 1.0 4 "$r" 0; done
for seed in 1 2; do
    for r in 0 3e-3 1e-2; do train "$1" "$2" 1.0 4 "$r" "$seed"; done
done
train "$1" "$2" 0.25 8 1e-2 0
