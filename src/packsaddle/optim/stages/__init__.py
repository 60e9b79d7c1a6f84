"""Stages of a step that can be left out: noise, the guard against gradients that are not finite, drift, escape.

Each keeps its own state. Read `escape` first, for lines 4 to 8 of Algorithm 1, then `noise` for line 9.
"""
