"""Networks and what is computed with them."""
