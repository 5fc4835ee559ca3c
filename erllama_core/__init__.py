"""Run GGUF models through llama.cpp and never compute the same prompt prefix twice."""
