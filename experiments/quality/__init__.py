"""Quality in a closed loop against what an open loop predicts: see __main__.py."""
