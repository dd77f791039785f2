"""reft."""

LAWS = {
    "reft": [dict(p=1, s=1), dict(r=2, p=0, s=2, tied=False)],
    "direft": [dict(p=1, s=1), dict(p=2, s=1, tied=False)],
}
