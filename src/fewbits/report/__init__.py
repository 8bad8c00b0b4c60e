"""How results look on paper: numbers, axes, plots, the page of a run and its model card. Plain data in, text out."""
