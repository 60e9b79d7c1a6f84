"""The paper's theorems as code: bounds, plans, Table 1, dynamics at saddles, test problems, diagnostics.

Read `bounds` first (assumptions and constants), then `plans` (parameters of Algorithm 1 for a target). `problems` has
objectives of known geometry, and `diagnostics` measures the ideas of the proof on them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packsaddle.theory.bounds import PRACTICAL, Assumptions, Constants, FirstOrderPlan, first_order_plan
    from packsaddle.theory.noise_walk import Walk, rms, suggest_noise
    from packsaddle.theory.plans import Plan, Reach, balanced_k, best_plan, plan, reach
    from packsaddle.theory.table1 import TABLE_1

__all__ = [
    "PRACTICAL",
    "TABLE_1",
    "Assumptions",
    "Constants",
    "FirstOrderPlan",
    "Plan",
    "Reach",
    "Walk",
    "balanced_k",
    "best_plan",
    "first_order_plan",
    "plan",
    "reach",
    "rms",
    "suggest_noise",
]
_FILES = {
    "bounds": "PRACTICAL Assumptions Constants FirstOrderPlan first_order_plan",
    "noise_walk": "Walk rms suggest_noise",
    "plans": "Plan Reach balanced_k best_plan plan reach",
    "table1": "TABLE_1",
}
_HOMES = {name: file for file, names in _FILES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import a public name's file when the name is first asked for: `import packsaddle` needs one of them."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
