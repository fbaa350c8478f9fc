"""What a model costs: parameters, FLOPs, bytes kept for the backward pass.

It imports architectures and what that may.
"""
