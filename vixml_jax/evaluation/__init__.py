"""Metrics with their intervals, the evaluation of embeddings and of models, and the choice of retrieval settings."""
