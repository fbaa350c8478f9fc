"""Raw text in; tokenizer, Arrow shards, manifest and exact, ordered batches out."""
