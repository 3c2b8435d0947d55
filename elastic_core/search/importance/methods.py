"""The names of the ranking methods. The first name of each kind is the default everywhere. This file needs no torch."""

# How a neuron, a head or a Mamba channel is scored. `output_norm` (ours): the norm of the vector that the unit adds to
# the residual stream. `projection` (the paper's): the magnitude of the output of the layer's first projection.
MEASURES = ("output_norm", "projection")

# How activations a are combined over batch and positions: √Σa², Σ|a| (the paper's equations), |mean a|.
AGGREGATIONS = ("l2", "l1", "mean")

# The channels of the residual stream: its principal axes (ours), or the parent's channels in the order of eq. 1.
BASES = ("principal", "channels")

# How layers are ranked; see `depth_ranking.METHODS`.
DEPTH_METHODS = ("iterative_nmse", "one_shot_nmse", "one_shot_perplexity")
