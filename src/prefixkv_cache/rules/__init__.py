"""Pure tensor functions: from the attention that keys received to which of them stay. No model, no cache, no files."""
