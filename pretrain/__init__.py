"""The trainer: configuration, run folder, engine, checkpoint, tracking, evaluation, report."""

import duet_pretrain

duet_pretrain.check("data_pipeline", "model")
