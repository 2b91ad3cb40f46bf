"""Page reports/index.html: what it reads, how its figures are put in words, and its templates."""
