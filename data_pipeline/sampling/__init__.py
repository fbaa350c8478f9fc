"""Which window of which source stands at each position of a run: pure functions of the seed.

It imports storage and what that may.
"""
