"""Files and folders as such: atomic writes, local paths and URIs alike.

It imports errors.
"""
