"""What people run: the commands, the demo, the report, and what reads models and data for them."""
