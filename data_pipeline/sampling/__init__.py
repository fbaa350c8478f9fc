"""What stands at each position of a run: windows, mixture, phases, order; all pure functions.

May import: data_pipeline.config, data_pipeline.errors, data_pipeline.files, data_pipeline.ingest,
data_pipeline.storage.
"""
