"""Masks on updates: learned dropout, L0 gates, their sites, penalties and statistics.

May import: model.attention, model.config, model.layers.
"""
