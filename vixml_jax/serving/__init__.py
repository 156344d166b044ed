"""Answers queries over HTTP: one process, one model, requests of many clients gathered into batches."""
