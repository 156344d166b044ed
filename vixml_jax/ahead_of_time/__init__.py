"""Compiles the programs of a config for an accelerator that is not there, and says what they need and cost."""
