"""What `pack` does: lists of pictures out of many kinds of sources, and shards of them."""
