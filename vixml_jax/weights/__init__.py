"""Pretrained weights: where they come from, and tables that carry them to our parameters and back."""
