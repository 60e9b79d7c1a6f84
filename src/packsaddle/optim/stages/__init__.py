"""Stages of a step that can be left out, each with its own state: noise, the guard against gradients that are not
finite, drift, contraction, learning rates, escape.

Read `escape` first, for lines 4 to 8 of Algorithm 1, then `noise` for line 9.
"""
