"""Communication between workers: groups, launching, failures, byte counts, and averaging compressed vectors.

Read `group` first (four collectives, and which group `resolve` finds), then `communicator` (the same with bytes
counted in a `ledger`) and `aggregators` (one class for each way to average messages, chosen by `select_aggregator`).
`simulation` runs W workers in one process; `cost_model` predicts bytes. torch.distributed is imported here, and
otherwise only in `optim.ddp` and by the benchmarks' peers.
"""
