"""What a model and its masks can be told. Free of torch.

May import: nothing of ours.
"""
