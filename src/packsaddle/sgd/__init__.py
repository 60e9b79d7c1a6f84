"""CompressedSGD, the paper's optimizer. Start with `optimizer`, which is Algorithm 1 with its line numbers.

- `gradient`: the update of a step: gradient, momentum or STORM, weight decay, noise
- `memories`: the choice of the error memory, and EF21's estimates in its place
- `lazy_noise`: noise drawn only for the coordinates that a step sends
"""
