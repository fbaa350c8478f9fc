"""The configuration of a run: sections, loading, the schedule of the learning rate.

It imports model and data_pipeline.
"""
