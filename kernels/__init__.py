"""Triton kernels, one module per operator, each with a host launcher of the operator's name and signature.

Nothing is imported here: the modules import triton, this package does not.
"""
