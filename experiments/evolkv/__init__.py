"""EvolKV: layer budgets found by search on some requests, judged on others."""
