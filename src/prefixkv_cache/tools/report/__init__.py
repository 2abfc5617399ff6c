"""`prefixkv report`: what a pruned cache kept of one prompt, as one page. Nothing else imports this package."""
