"""The page: a browser window on one engine. Started by launch.py; the core does not know that it exists."""
