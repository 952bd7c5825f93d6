"""Deployment: what pruning gains once training is over."""

from swdlib.deploy.reports import Report, report, sparse_linears
from swdlib.deploy.shrinking import shrink
from swdlib.deploy.stored import load_sparse, save_sparse, to_onnx

__all__ = ["Report", "load_sparse", "report", "save_sparse", "shrink", "sparse_linears", "to_onnx"]
