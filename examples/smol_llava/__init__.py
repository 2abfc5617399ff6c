"""The parts of `train_smol_llava.py`: a vision-language model around SmolLM2-135M-Instruct."""
