"""GGUF, the file of llama.cpp: read strictly, as the checkpoint in Hugging Face format that it was made of."""
