"""The architectures, what they share, and the objective they are trained for.

It imports masks and what that may.
"""
