"""Translating recipe files of other tools."""
