"""Trimtab's methods inside other people's loops and models.

Nothing is imported here: each module of this package needs the library that it is named after.
"""
