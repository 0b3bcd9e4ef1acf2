"""`python -m bench`: what this machine does with the service, beside what the hardware could do.

Ratios are taken inside one run, their blocks interleaved, so that a machine that drifts drifts for both sides alike.
"""
