"""Path-star: find the one of several arms of a graph that ends in the goal."""
