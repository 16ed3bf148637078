"""Presets: one YAML file of settings each."""
