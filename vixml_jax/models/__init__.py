"""Models as Flax NNX modules: layers, text encoders, image fusion, label prototypes, vision towers."""
