"""The commands, a file a subject. Each imports what it runs inside its own function.

May import: data_pipeline.building, data_pipeline.config, data_pipeline.counts, data_pipeline.errors,
data_pipeline.files, data_pipeline.ingest, data_pipeline.inspection, data_pipeline.places, data_pipeline.sampling,
data_pipeline.storage, launch.completion, launch.local, launch.progress, launch.slurm, model.architectures,
model.config, model.costs, model.generation, model.gpus, pretrain.checkpoint, pretrain.config, pretrain.export,
pretrain.finetune, pretrain.inference, pretrain.planning, pretrain.preflight, pretrain.probing, pretrain.run,
pretrain.status_line, pretrain.study, pretrain.tracking.
"""
