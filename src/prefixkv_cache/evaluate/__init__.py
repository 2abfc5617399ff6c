"""`prefixkv evaluate`: what pruning costs in perplexity, agreement with the full cache and right answers."""
