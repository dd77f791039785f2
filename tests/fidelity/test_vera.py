"""vera."""

LAWS = {"vera": [dict(r=16), dict(r=3, d_init=0.5, projection_seed=7)]}
KEPT = {"vera": (dict(r=8), 8)}
