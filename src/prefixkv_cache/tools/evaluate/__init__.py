"""`prefixkv evaluate`: what pruning costs in divergence, agreement with the full cache and right answers."""
