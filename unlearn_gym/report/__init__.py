"""Tables, pictures and pages from result files."""
