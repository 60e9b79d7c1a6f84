"""The paper's theorems as code: bounds, plans, Table 1, dynamics at saddles, test problems, diagnostics.

Read `bounds` first (assumptions and constants), then `plan` (parameters of Algorithm 1 for a target). `problems` has
objectives of known geometry, and `diagnostics` measures the ideas of the proof on them.
"""
