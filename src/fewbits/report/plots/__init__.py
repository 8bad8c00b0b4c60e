"""Figures: data in, one <svg> element out. Labels stand beside what they name; tips say the numbers."""
