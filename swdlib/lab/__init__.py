"""The lab: what the book's notebooks need and nobody else."""
