"""The options of a model and of its masks. Free of torch.

It imports nothing of the package.
"""
