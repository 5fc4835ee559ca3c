"""One loaded model: its worker, sequences, requests and what a caller holds of it."""
