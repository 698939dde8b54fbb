"""From a decision to a packed model: cut, reorder, calibrate, round, pack."""
