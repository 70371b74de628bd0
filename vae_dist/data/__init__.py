"""Tar shards in, batches of images out."""
