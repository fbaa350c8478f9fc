"""Configuration of a model and its masks. Free of torch.

May import: nothing of ours.
"""
