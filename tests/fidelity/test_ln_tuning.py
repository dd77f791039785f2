"""ln_tuning."""

LAWS = {"ln_tuning": [{}, dict(beta=False)]}
