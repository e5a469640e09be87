"""Runs of many policies on equal terms: run, kept and read again."""
