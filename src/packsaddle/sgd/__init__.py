"""CompressedSGD, the paper's optimizer: `optimizer` is Algorithm 1 with its line numbers, so read it first.

- `gradient`: the update u of a step: gradient, momentum or STORM, weight decay, noise
- `lazy_noise`: noise that is drawn only where a step sends it
"""
