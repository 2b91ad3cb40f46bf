"""Projects of one's own: what `isim init` writes, how long it will take, what keeps it together."""
