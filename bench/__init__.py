"""`python -m bench`: measures the server on this machine, and compares it with ONNX Runtime alone and with Triton.

Every section measures its cells in interleaved blocks, so that a machine that drifts does so for all of them. Compare
ratios from one run, not absolute figures from two.
"""
