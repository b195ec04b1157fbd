"""Model cards: sections, front matter, plots, and the index of all cards."""
