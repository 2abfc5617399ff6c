"""Text tasks for measuring what pruning costs a language model: prose (passages.py) and questions on it (tasks.py)."""
