"""The trainer: configuration, run folder, engine, checkpoint, tracking, evaluation, report."""
