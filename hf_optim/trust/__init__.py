"""Decides which input is trusted: code, weight files, structured text, and text that goes into cards.

Every door asks this package. It imports nothing but the errors, so that every other package can.
"""
