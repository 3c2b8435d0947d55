"""How units and layers can be ranked, by name. The first name of each is the default everywhere. Needs no torch."""

# Neurons, heads and Mamba channels: `output_norm` is the norm of what a unit adds to the residual stream (ours),
# `projection` the magnitude of what the layer's first projection puts out (the paper's).
MEASURES = ("output_norm", "projection")

# Over batch and positions: √Σa², Σ|a| (as the paper's equations have it), |mean a|.
AGGREGATIONS = ("l2", "l1", "mean")

DEPTH_METHODS = ("iterative_nmse", "one_shot_nmse", "one_shot_perplexity")
