#!/usr/bin/env bash
# Twenty runs, a minute or two each on one core: bash lab/studies/blocks.sh DATA_DIR OUT
set -euo pipefail
here=experiments/blocks
for seed in 0 1 2 3 4; do
    for size in 1 default 64 128; do
        set -- "$1" "$2" seed="$seed" label="$size"
        [ "$size" = default ] || set -- "$@" compressor.block_size="$size"
        python -m lab run "$here/config.toml" --data-dir "$1" --out "$2/$size-$seed" --set "${@:3}"
    done
done
