"""The parts of dev/gpu_check.py, and what they share."""
