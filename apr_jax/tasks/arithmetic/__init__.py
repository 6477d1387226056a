"""Arithmetic: work out an expression with nested brackets, modulo a small number."""
