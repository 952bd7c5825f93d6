"""The lab: what the book's notebooks need and nobody else."""

from swdlib import require_extra

require_extra("swdlib.lab", "lab")
