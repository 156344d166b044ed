"""The Python interface on which the commands stand: data sets, training, trained models."""
