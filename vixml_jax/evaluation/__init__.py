"""Metrics, their intervals, retrieval-augmented inference and the report."""
