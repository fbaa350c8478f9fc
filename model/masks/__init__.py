"""Masks on updates: learned dropout, L0 gates, their sites, penalties and statistics.

It imports attention and what that may.
"""
