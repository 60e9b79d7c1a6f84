"""CompressedSGD, the optimizer of the paper. Start with `optimizer`, which quotes the line numbers of Algorithm 1.

- `gradient`: computes the update of a step from the gradient, momentum or STORM, weight decay and noise
- `memories`: selects the error memory, or EF21's estimates of the gradient, which replace the error memory
- `lazy_noise`: draws noise only for the coordinates that a step sends
"""
