"""Prediction with a trained workdir: encoding of queries, search, files of queries, and labels added after training."""
