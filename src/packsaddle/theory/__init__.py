"""The paper's theorems as code: bounds, plans, Table 1, and the random walk due to artificial noise.

Start with `bounds` (assumptions and constants), then `plans` (parameters of Algorithm 1 for a target accuracy).
"""

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
