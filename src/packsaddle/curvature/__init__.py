"""Second-order information: Hessian-vector products, Lanczos, certificates of stationarity, stability of step sizes.

Read `certify` first: the certificate, from `hessian` (products on one worker or many) and `lanczos` (bounds on the
smallest eigenvalue). `certificate` has the verdict and its evidence, `iterates` draws the points to certify, and
`step_stability` finds steps that are too long for the curvature.
"""
