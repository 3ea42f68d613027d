"""The pass of calibration images through a network, layer by layer."""
