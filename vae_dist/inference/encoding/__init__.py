"""A data set to shards of latents: plan, reading, writing, and the folder that they make."""
