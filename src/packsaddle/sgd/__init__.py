"""CompressedSGD, the optimizer of the paper. Start with the module `optimizer`, whose comments name the lines of
Algorithm 1.

- `gradient`: computes the update of a step from gradient, weight decay and noise, with momentum if set
- `lazy_noise`: draws noise only for the coordinates that a step sends
"""
