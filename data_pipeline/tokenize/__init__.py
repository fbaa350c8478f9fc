"""Text to ids and back: SentencePiece and imported tokenizers.

May import: data_pipeline.config, data_pipeline.errors, data_pipeline.ingest.
"""
