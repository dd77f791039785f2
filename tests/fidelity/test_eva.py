"""eva."""

LAWS = {"eva": [dict(r=4), dict(r=2, rho=1.0, whiten=True, center=False)]}
KEPT = {"eva": (dict(r=8, rho=1.0), 96 + 8)}
