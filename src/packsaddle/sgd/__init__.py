"""CompressedSGD, the paper's optimizer: `optimizer` is Algorithm 1 with its line numbers, so read it first.

- `gradient`: the update of a step: gradient, momentum or STORM, weight decay, noise
- `memories`: EF21's estimates, and the error memory kept in the gradients
- `lazy_noise`: noise drawn only for the coordinates that a step sends
"""
