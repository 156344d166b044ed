"""The names of the ways to rank labels, in a module of its own because flags need them before anything is loaded."""

PLAIN, AUGMENTED, BLEND = RANKINGS = ("plain", "retrieval_augmented", "blend")
"""By inner product, by retrieval-augmented inference, and by the probability of the trained blend."""
