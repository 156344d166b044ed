"""Compiles the programs of a config for devices that need not exist, and reports their memory, cost and time."""
