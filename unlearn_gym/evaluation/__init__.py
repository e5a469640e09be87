"""Metrics, the comparison protocol, statistics and the report."""
