"""Many runs that are compared: the file, the results, the page, the plots; ladders of sizes, and losses over compute.

May import: data_pipeline.errors, data_pipeline.files, data_pipeline.secret, data_pipeline.storage, model.costs,
pretrain.config, pretrain.metric_names, pretrain.report, pretrain.run.
"""
