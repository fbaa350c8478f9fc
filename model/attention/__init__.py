"""Attention, what may be seen in it, and the cache of keys and values.

It imports layers and what that may.
"""
