"""Experiments: a configuration in, a record out, one run or many."""
