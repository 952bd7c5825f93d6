"""Experiments: a configuration in, a record out, one run or many."""

from swdlib import require_extra

require_extra("swdlib.runs", "runs")
