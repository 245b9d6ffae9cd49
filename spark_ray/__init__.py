"""Map where KV-cache capacity diverges between environments, and why."""

__version__ = "0.1.0"
