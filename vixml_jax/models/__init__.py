"""Models as Flax NNX modules: layers, text encoders, label prototypes."""
