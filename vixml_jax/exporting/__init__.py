"""Export of trained encoders and label embeddings to the formats of other libraries."""
