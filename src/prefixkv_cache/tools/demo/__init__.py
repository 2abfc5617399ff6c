"""Drawn scenes and what the demo needs around them; the library itself never imports this package."""
