"""Analysis as a product of its own: everything known about a model's parts, in one JSON-able result."""

from lamina.inspection.inspection import Inspection, analyze

__all__ = ["Inspection", "analyze"]
