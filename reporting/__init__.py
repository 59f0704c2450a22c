"""Scores with their intervals, and the HTML page that shows them."""
