"""The data sets and networks of the lab, and the distribution of examples to workers."""
