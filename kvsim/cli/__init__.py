"""The command line: each command is a few lines over the public API; everything heavy loads on first use."""

from kvsim.cli import measure, replay, traces  # they register their commands
from kvsim.cli.app import app, main
