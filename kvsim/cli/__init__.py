"""The command line: each command is a few lines over the public API; everything heavy loads on first use."""

from kvsim.cli import replay, curves, measure, traces  # noqa: I001 (in the order in which --help lists their commands)
from kvsim.cli.app import app, main
