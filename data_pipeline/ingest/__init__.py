"""Raw text in: sources, readers by format, filters, duplicates, splits.

May import: data_pipeline.config, data_pipeline.errors, data_pipeline.files.
"""
