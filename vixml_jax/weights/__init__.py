"""Pretrained weights: where they are found, and tables that convert them to our parameters and back."""
