"""Measurements that decided a design question, kept so that they can be repeated."""
