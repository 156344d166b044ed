"""Answers queries from a workdir: a trained encoder, its label index, and files of queries larger than memory."""
