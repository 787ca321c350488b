"""Localized machine unlearning through the lens of memorization: the library."""
