"""Measures of fidelity, diversity, mode loss and speed."""
