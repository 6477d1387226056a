"""What a run saves, how it is checked, and the model files made from it."""
