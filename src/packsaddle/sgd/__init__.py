"""CompressedSGD, the paper's optimizer. Start with `optimizer`, which is Algorithm 1 with its line numbers.

- `gradient`: the update of a step: gradient, momentum or STORM, weight decay, noise
- `memories`: EF21's estimates, and the error memory kept in the gradients
- `lazy_noise`: noise drawn only for the coordinates that a step sends
"""
