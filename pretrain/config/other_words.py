"""What other trainers call a key of ours, so that an error can name ours; and what is another unit here."""

_WORDS = (
    ("optimizer.lr", "the peak", "learning_rate max_lr peak_lr base_lr"),
    ("optimizer.kind", "", "optim optimizer_type"),
    ("optimizer.weight_decay", "", "wd decay"),
    ("optimizer.betas", "both: [0.9, 0.95]", "beta1 beta2 adam_beta1 adam_beta2"),
    ("optimizer.eps", "", "epsilon adam_epsilon adam_eps"),
    (
        "optimizer.clip",
        "of the gradient's norm",
        "grad_clip clip_grad max_grad_norm gradient_clipping gradient_clip_val",
    ),
    ("schedule.kind", "", "lr_scheduler_type lr_scheduler scheduler lr_decay_style"),
    ("schedule.warmup_steps", "", "warmup warmup_iters num_warmup_steps lr_warmup_iters"),
    ("schedule.warmup_steps", "in steps, not as a share", "warmup_ratio lr_warmup_fraction"),
    ("schedule.final_lr", "a learning rate, not a share of the peak", "min_lr lr_min end_lr"),
    ("batch.tokens", "in tokens: sequences × model.context", "batch_size train_batch_size global_batch_size"),
    (
        "batch.micro_batch",
        "sequences that a rank holds at once",
        "per_device_train_batch_size per_device_batch_size device_batch_size micro_batch_size "
        "train_micro_batch_size_per_gpu",
    ),
    (
        "batch.tokens",
        "the micro-batches of a step follow from it, batch.micro_batch and the number of ranks",
        "gradient_accumulation_steps grad_accum_steps grad_accum accumulate_grad_batches",
    ),
    (
        "train.steps",
        "or train.tokens; `duet data plan CONFIG` says how many epochs they are",
        "epochs num_epochs num_train_epochs max_epochs n_epochs",
    ),
    ("train.steps", "", "max_steps max_iters train_iters num_steps total_steps training_steps iterations"),
    ("train.steps", "the curve ends with the run", "lr_decay_iters lr_decay_steps"),
    ("train.tokens", "", "max_tokens train_tokens total_tokens"),
    ("train.checkpoint_every", "in steps", "save_steps save_interval save_every ckpt_interval checkpoint_interval"),
    ("train.keep_checkpoints", "", "save_total_limit"),
    ("train.log_every", "in steps", "logging_steps log_interval log_freq"),
    ("train.eval_every", "in steps", "eval_steps eval_interval val_check_interval validation_interval"),
    ("model.layers", "of each stream", "n_layer n_layers num_layers num_hidden_layers depth"),
    ("model.width", "", "hidden_size n_embd d_model dim embed_dim"),
    ("model.heads", "", "n_head n_heads num_heads num_attention_heads"),
    ("model.kv_heads", "", "n_kv_heads num_key_value_heads num_query_groups"),
    ("model.ff_width", "", "intermediate_size ffn_hidden_size d_ff ffn_dim"),
    (
        "model.context",
        "in tokens",
        "block_size seq_len seq_length sequence_length max_seq_len max_seq_length max_length context_length "
        "n_positions n_ctx max_position_embeddings",
    ),
    ("engine.precision", "bf16, fp16 or fp32", "fp16 bf16 mixed_precision dtype amp"),
    ("engine.zero_stage", "0, 1, 2 or 3", "zero zero_optimization stage"),
    ("engine.activation_checkpointing", "true or false", "gradient_checkpointing recompute"),
    ("engine.compile", "true or false", "torch_compile use_compile"),
    ("data.path", "made by `duet data build`", "dataset dataset_name data_dir train_data"),
    ("data.sources.NAME.paths", "for `duet data build`", "train_file train_files"),
    ("data.tokenizer.vocab_size", "of a dataset that is to be built; a model takes its dataset's", "vocab_size"),
    ("run.seed", "", "random_seed manual_seed"),
    ("run.dir", "runs/NAME of run.name unless given", "output_dir out_dir save_dir"),
    ("run.name", "", "run_name wandb_run_name experiment"),
    ("run.start_from", "or train the same run again, which goes on", "resume_from_checkpoint init_from"),
    ("tracking.experiment", "of MLflow", "wandb_project project project_name"),
    ("tracking.mode", "online, offline or off: of MLflow", "report_to"),
)
"""Our key, what else is to know, and the others' words."""
OURS = {word: (key, note) for key, note, words in _WORDS for word in words.split()}
