"""The package's own engine: sampling on the CPU with a compiled decode loop."""
