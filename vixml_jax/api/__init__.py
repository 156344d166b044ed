"""The Python interface, made of the same functions as the commands: data sets, training, trained models."""
