"""What a run measures of itself, and where the numbers go."""
