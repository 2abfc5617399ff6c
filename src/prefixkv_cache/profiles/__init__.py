"""Profiles: how much each layer or key head keeps at each budget. Import from the modules: this imports nothing."""
