"""Files and folders as such: atomic writes, local paths and URIs alike.

May import: data_pipeline.errors.
"""
