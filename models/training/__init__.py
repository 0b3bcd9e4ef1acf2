"""Recipes for the shipped weights (`python -m models.training NAME`), and the data that export measures with."""
