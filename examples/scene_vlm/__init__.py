"""What `train_scene_vlm.py` trains: the families of models, the tasks they learn, and their common small language."""
