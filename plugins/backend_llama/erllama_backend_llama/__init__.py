"""The llama.cpp backend of erllama."""
