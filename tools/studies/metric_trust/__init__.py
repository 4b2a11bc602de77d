"""How far each metric can be trusted: its ranks against measured single-site damage."""
