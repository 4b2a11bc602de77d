"""Damage against size of every precision form, beside the tools of others."""
