"""Data: what networks are trained and tested on."""
