"""Memory pressure of NVIDIA GPUs."""
