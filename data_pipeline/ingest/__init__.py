"""Raw text in: sources, readers by format, filters, duplicates, splits.

It imports files.
"""
