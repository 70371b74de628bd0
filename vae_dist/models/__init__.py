"""The model: towers, a posterior, likelihoods, one forward; and networks that others published."""
