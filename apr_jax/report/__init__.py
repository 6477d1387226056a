"""What a person looks at: tables in the terminal, a solved tree, and the HTML page.

- `loaded`: a trained model in Python, and the trees that it grows.
- `solve`: one problem in the terminal.
- `terminal_tables`: tables of scores and comparisons in the terminal.
- `viewer`: the HTML page with the viewer of thread trees; its scripts and styles are in `assets/`.
"""
