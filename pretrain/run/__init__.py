"""The run folder: identity, journal, lease, records of attempts. Free of torch.

It imports config.
"""
