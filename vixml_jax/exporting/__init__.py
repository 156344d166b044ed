"""Trained encoders and label embeddings in the formats of other libraries."""
