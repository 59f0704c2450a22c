"""Scores with their intervals, the model card, and the HTML page. Nothing is trained in here."""
