"""Time: a model of the step, the plan for a link, measured coding speed, and benchmarks.

Read `step_time` first (what a step costs, term by term), then `link_planner` (what pays at which rate). `bench` has
one module for each question that a benchmark answers.
"""
