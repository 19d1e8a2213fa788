"""Shipped recipes, one TOML file per published run."""
