"""Experiments: the paper's figures and further studies, with their committed results."""
