"""A dataset on disk: shards, manifest, token streams; at a URI, through a cache.

It imports tokenize and what that may.
"""
