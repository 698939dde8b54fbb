"""The decision: mask space, hypernetwork, training, hardening, baselines."""
