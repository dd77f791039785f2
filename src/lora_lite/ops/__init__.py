"""Mathematics that several variants share, one operation a file."""
