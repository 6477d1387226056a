"""Mini-sudoku: six rows, six columns and six boxes of two rows and three columns."""
