"""Data: what networks are trained and tested on."""

from swdlib import require_extra

require_extra("swdlib.data", "data")
