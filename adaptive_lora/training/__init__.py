"""Ranks that change in any loop and any Trainer."""
