"""Text from a model: sampling, cached decoding, what it did with each token.

It imports architectures and what that may.
"""
